"""Laws of form: short files, short functions, speaking names, packages without logic, no module state."""

from __future__ import annotations

import ast

from tests.architecture.source import PRODUCT, PROJECT, Source, sample

FILE_LINES = 400
FUNCTION_LINES = 80
SAYS_NOTHING = frozenset({"utils", "util", "helpers", "helper", "common", "misc", "stuff", "functions"})


def length_complaints(source: Source) -> list[str]:
    """Files and functions that no longer fit in a head."""
    found = []
    lines = source.text.count("\n")
    if lines > FILE_LINES:
        found.append(source.complaint(source.tree, f"{lines} lines, at most {FILE_LINES}"))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                found.append(source.complaint(node, f"{node.name} has {length} lines, at most {FUNCTION_LINES}"))
    return found


def name_complaints(source: Source) -> list[str]:
    """Modules and folders whose name says nothing about what is inside."""
    parts = source.path.removesuffix(".py").split("/")
    return [source.complaint(source.tree, f"{part} says nothing") for part in parts if part in SAYS_NOTHING]


def package_logic_complaints(source: Source) -> list[str]:
    """An `__init__.py` may hold a docstring, imports and `__all__`."""
    if not source.path.endswith("__init__.py"):
        return []
    found = []
    for number, node in enumerate(source.tree.body):
        docstring = number == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        listing = isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
        if not (docstring or listing or isinstance(node, ast.Import | ast.ImportFrom)):
            found.append(source.complaint(node, "an __init__.py only hands names on"))
    return found


def state_complaints(source: Source) -> list[str]:
    """Hidden state: `global`, empty containers at module level that something must fill later, writes on a config."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            found.append(source.complaint(node, f"global {', '.join(node.names)}: pass the value instead"))
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            found += [
                source.complaint(node, f"{ast.unparse(target)} is written, but a configuration never changes")
                for target in targets
                if isinstance(target, ast.Attribute) and ast.unparse(target.value).split(".")[-1] == "config"
            ]
    for node in source.tree.body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        empty = isinstance(value, ast.Dict | ast.List | ast.Set) and not ast.unparse(value).strip("[]{}")
        made = isinstance(value, ast.Call) and not value.args and ast.unparse(value.func) in {"dict", "list", "set"}
        if (empty or made) and "__all__" not in ast.unparse(node):
            found.append(source.complaint(node, "an empty container at module level is state that many share"))
    return found


def test_files_and_functions_are_short() -> None:
    assert [complaint for source in PROJECT for complaint in length_complaints(source)] == []


def test_length_law_can_complain() -> None:
    assert length_complaints(sample("megatron/a.py", "x = 1\n" * 401))
    assert length_complaints(sample("megatron/a.py", "class A:\n    def f(self):\n" + "        x = 1\n" * 80))
    assert length_complaints(sample("megatron/a.py", "def f():\n" + "    x = 1\n" * 79)) == []


def test_names_say_something() -> None:
    assert [complaint for source in PROJECT for complaint in name_complaints(source)] == []


def test_name_law_can_complain() -> None:
    assert name_complaints(sample("megatron/data/utils.py", ""))
    assert name_complaints(sample("megatron/common/batch.py", ""))
    assert name_complaints(sample("megatron/data/dataset/batch.py", "")) == []


def test_packages_hold_no_logic() -> None:
    assert [complaint for source in PROJECT for complaint in package_logic_complaints(source)] == []


def test_package_law_can_complain() -> None:
    assert package_logic_complaints(sample("megatron/data/__init__.py", "VERSION = 1\n"))
    assert package_logic_complaints(sample("megatron/data/__init__.py", "def f():\n    pass\n"))
    assert (
        package_logic_complaints(sample("megatron/data/__init__.py", '"""Rows."""\nfrom a import b\n__all__ = ["b"]\n'))
        == []
    )


def test_no_hidden_state() -> None:
    assert [complaint for source in PRODUCT for complaint in state_complaints(source)] == []


def test_state_law_can_complain() -> None:
    assert state_complaints(sample("megatron/a.py", "def f():\n    global x\n    x = 1\n"))
    assert state_complaints(sample("megatron/a.py", "_groups: dict[str, int] = {}\n"))
    assert state_complaints(sample("megatron/a.py", "seen = set()\n"))
    assert state_complaints(sample("megatron/a.py", "def f(config):\n    config.seed = 1\n"))
    assert state_complaints(sample("megatron/a.py", "def f(self):\n    self.config.model.x += 1\n")) == []
    assert state_complaints(sample("megatron/a.py", 'NAMES = {"a": 1}\nself.config = config\n')) == []
