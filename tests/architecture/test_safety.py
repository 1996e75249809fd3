"""Laws of care: files that could run code are not loaded, errors are not swallowed, users are not met with asserts."""

from __future__ import annotations

import ast

from tests.architecture.source import PRODUCT, Source, imports, sample

RUNS_CODE = frozenset({"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"})
PICKLE_FREE = ("megatron/data/", "megatron/tokenizers/", "megatron/config/", "megatron/inference/", "tools/")

USERS_VALUES = (
    "megatron/config/derived/fill.py",
    "megatron/config/coerce.py",
    "megatron/config/derived/",
    "megatron/config/flags.py",
    "megatron/config/renamed_keys.py",
    "megatron/config/yaml_loader.py",
    "megatron/config/paths.py",
    "megatron/config/resolve.py",
    "megatron/config/validation/",
)
"""Where values that a user wrote are judged."""


def loading_complaints(source: Source) -> list[str]:
    """torch.load and numpy.load that would run what a file says, and pickle where users' files are read."""
    found = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load" and options.get("weights_only") != "True":
            found.append(source.complaint(node, "torch.load without weights_only=True runs what the file says"))
        elif options.get("weights_only", "True") == "False" or options.get("allow_pickle", "False") == "True":
            found.append(source.complaint(node, f"{called} would run what the file says"))
        elif called in {"yaml.load", "yaml.unsafe_load", "yaml.full_load"} and not _loads_safely(source, node):
            found.append(source.complaint(node, f"{called} without a safe loader"))
    if source.within(*PICKLE_FREE):
        found += [
            source.complaint(item.node, f"{item.top} runs what a file says")
            for item in imports(source)
            if item.top in RUNS_CODE
        ]
    return found


def _loads_safely(source: Source, call: ast.Call) -> bool:
    """Whether the loader is a safe one, or a class of this file that is made from a safe one."""
    loader = " ".join(ast.unparse(part) for part in [*call.args[1:], *(keyword.value for keyword in call.keywords)])
    own = {node.name for node in source.tree.body if isinstance(node, ast.ClassDef)}
    return "SafeLoader" in loader or (loader in own and "SafeLoader" in source.text)


def swallowing_complaints(source: Source) -> list[str]:
    """Handlers that catch everything, or that catch much and say nothing."""
    found = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        broad = node.type is None or ast.unparse(node.type) in {"BaseException", "Exception"}
        silent = all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
        if node.type is None:
            found.append(source.complaint(node, "a bare except also catches an interrupt"))
        elif broad and silent:
            found.append(source.complaint(node, f"except {ast.unparse(node.type)} without a message"))
    return found


def assert_complaints(source: Source) -> list[str]:
    """Returns asserts on users' values, which need a ConfigError: `assert` is removed by -O and has no message.

    What only narrows a type (`assert x is not None`, `assert isinstance(x, T)`) is no check of a user.
    """
    if not (source.is_entry_point or source.within(*USERS_VALUES)):
        return []
    return [
        source.complaint(node, "raise ConfigError with key, value, location and hint instead")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Assert) and not _narrows(node)
    ]


def _narrows(node: ast.Assert) -> bool:
    """Whether the test only says that values are there, or of which type they are."""
    parts = node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
    reported = [ast.unparse(part) for part in parts]
    there = all(part.endswith(" is not None") or part.replace(".", "_").isidentifier() for part in reported)
    return node.msg is None and (there or all(part.startswith("isinstance(") for part in reported))


def test_no_file_runs_code() -> None:
    assert [complaint for source in PRODUCT for complaint in loading_complaints(source)] == []


def test_loading_law_can_complain() -> None:
    assert loading_complaints(sample("megatron/a.py", "torch.load(f)\n"))
    assert loading_complaints(sample("megatron/a.py", "torch.load(f, weights_only=False)\n"))
    assert loading_complaints(sample("megatron/a.py", "reader(f, weights_only=False)\n"))
    assert loading_complaints(sample("megatron/a.py", "np.load(f, allow_pickle=True)\n"))
    assert loading_complaints(sample("megatron/a.py", "yaml.load(f)\n"))
    assert loading_complaints(sample("megatron/a.py", "class L(yaml.Loader): ...\nyaml.load(f, Loader=L)\n"))
    assert loading_complaints(sample("megatron/a.py", "class L(yaml.SafeLoader): ...\nyaml.load(f, Loader=L)\n")) == []
    assert loading_complaints(sample("megatron/data/a.py", "import pickle\n"))
    assert (
        loading_complaints(sample("megatron/data/a.py", "torch.load(f, weights_only=True)\nyaml.safe_load(f)\n")) == []
    )


def test_no_error_is_swallowed() -> None:
    assert [complaint for source in PRODUCT for complaint in swallowing_complaints(source)] == []


def test_swallowing_law_can_complain() -> None:
    assert swallowing_complaints(sample("a.py", "try:\n    f()\nexcept:\n    raise\n"))
    assert swallowing_complaints(sample("a.py", "try:\n    f()\nexcept Exception:\n    pass\n"))
    assert swallowing_complaints(sample("a.py", "try:\n    f()\nexcept OSError:\n    pass\n")) == []


def test_users_meet_no_asserts() -> None:
    assert [complaint for source in PRODUCT for complaint in assert_complaints(source)] == []


def test_assert_law_can_complain() -> None:
    assert assert_complaints(sample("train.py", "assert config.seed > 0\n"))
    assert assert_complaints(sample("megatron/config/validation/optimizer.py", "def f(x):\n    assert x > 0\n"))
    assert assert_complaints(sample("megatron/config/validation/optimizer.py", "assert x is not None, 'give x'\n"))
    assert assert_complaints(sample("megatron/config/validation/optimizer.py", "assert x is not None\n")) == []
    assert assert_complaints(sample("megatron/model/block.py", "assert x\n")) == []
