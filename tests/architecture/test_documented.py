"""Laws of documentation: parameters and fields are documented one by one where a reader would have to search."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.architecture.source import PRODUCT, Source, sample

UNDOCUMENTED_PARAMETERS = 3  # a function with more has an `Args:` section
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(node: ast.AST, of: ast.ClassDef | None = None) -> Iterator[tuple[Function, ast.ClassDef | None]]:
    """Every public function and constructor of a module or class, with its class; not those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child, child)
        elif isinstance(child, Function) and (not child.name.startswith("_") or child.name == "__init__"):
            yield child, of


def decorators(node: Function | ast.ClassDef) -> set[str]:
    """The last names of the decorators: `typing.override` -> override."""
    calls = (each.func if isinstance(each, ast.Call) else each for each in node.decorator_list)
    return {ast.unparse(each).rpartition(".")[2] for each in calls}


def parameter_complaints(source: Source) -> list[str]:
    """Public functions with many parameters and no `Args:` section; a constructor may have it in its class."""
    found = []
    for function, of in public_functions(source.tree):
        given = function.args
        names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        count = len([name for name in names if name not in {"self", "cls"}])
        text = ast.get_docstring(function) or ""
        constructs = of is not None and function.name == "__init__"
        if constructs and of is not None:
            text += ast.get_docstring(of) or ""
        # The parameters of a kernel are explained by the file and by the function that starts it.
        overrides = bool(decorators(function) & {"override", "jit"}) or not (text or constructs)
        if count > UNDOCUMENTED_PARAMETERS and "Args:" not in text and not overrides:
            found.append(source.complaint(function, f"{function.name} has {count} parameters and no `Args:` section"))
    return found


def field_complaints(source: Source) -> list[str]:
    """Fields of public dataclasses with several fields that have no docstring under them."""
    found = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_") or "dataclass" not in decorators(node):
            continue
        fields = [
            (each, below)
            for each, below in zip(node.body, [*node.body[1:], None], strict=True)
            if isinstance(each, ast.AnnAssign) and not ast.unparse(each.target).startswith("_")
        ]
        for each, below in fields if len(fields) > 1 else ():
            documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if not documented:
                name = f"{node.name}.{ast.unparse(each.target)}"
                found.append(source.complaint(each, f"the field {name} has no docstring under it"))
    return found


def test_many_parameters_are_documented_one_by_one() -> None:
    assert [complaint for source in PRODUCT for complaint in parameter_complaints(source)] == []


def test_fields_are_documented_one_by_one() -> None:
    assert [complaint for source in PRODUCT for complaint in field_complaints(source)] == []


def test_the_law_of_parameters_can_complain() -> None:
    def complaints(text: str) -> list[str]:
        return parameter_complaints(sample("megatron/data/x.py", text))

    assert complaints('def f(a, b, c, d):\n    """Adds."""\n')
    assert complaints('class A:\n    """Adds."""\n    def __init__(self, a, b, *, c, d): ...\n')
    assert complaints('class A:\n    """Adds."""\n    def f(self, a, b, c, d):\n        """Adds."""\n')
    assert complaints('def f(a, b, c, d):\n    """Adds.\n\n    Args:\n        a: One.\n    """\n') == []
    assert complaints('class A:\n    """Adds.\n\n    Args:\n    """\n    def __init__(self, a, b, c, d): ...\n') == []
    assert complaints('def _f(a, b, c, d):\n    """Adds."""\n') == []
    assert complaints('def f(a, b, c):\n    """Adds."""\n') == []


def test_the_law_of_fields_can_complain() -> None:
    def complaints(text: str) -> list[str]:
        return field_complaints(sample("megatron/data/x.py", f"@dataclass(frozen=True)\nclass A:\n{text}"))

    assert complaints('    a: int\n    """One."""\n    b: int\n')
    assert complaints('    a: int\n    b: int\n    """Two."""\n')
    assert complaints('    a: int\n    """One."""\n    b: int\n    """Two."""\n') == []
    assert complaints("    a: int\n") == []
