"""Law of imports: names that a file imports from the project exist, also in tools and scripts of pages."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

from tests.architecture.source import PROJECT, ROOT, Source, imports, sample

OURS = ("megatron", "tools", "tests", "benchmarks")


def defined_names(source: Source) -> frozenset[str]:
    """Returns the names that a module defines or imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
    return frozenset(names)


def missing_names(sources: Sequence[Source], project: Mapping[str, Source]) -> list[str]:
    """Returns the imports of names that the imported module of the project does not have."""
    found = []
    names: dict[str, frozenset[str]] = {}
    for source in sources:
        for item in imports(source):
            if item.top not in OURS or item.name is None or f"{item.module}.{item.name}" in project:
                continue
            if item.module not in project:
                continue  # a package of namespaces, or another project's module of that name
            if item.module not in names:
                names[item.module] = defined_names(project[item.module])
            if item.name not in names[item.module]:
                found.append(source.complaint(item.node, f"{item.module} has no {item.name}"))
    return found


def modules(sources: Sequence[Source]) -> dict[str, Source]:
    return {source.module: source for source in sources}


def test_imported_names_exist() -> None:
    scripts = [
        Source(path.relative_to(ROOT).as_posix(), path.read_text("utf-8")) for path in (ROOT / "docs").glob("*.py")
    ]
    assert scripts
    assert missing_names([*PROJECT, *scripts], modules(PROJECT)) == []


def test_import_law_can_complain() -> None:
    project = modules(
        [sample("megatron/a.py", "def f(): pass\nx = 1\nimport json\n"), sample("megatron/__init__.py", "")]
    )
    assert missing_names([sample("tools/b.py", "from megatron.a import g\n")], project)
    assert missing_names([sample("tools/b.py", "def main():\n    from megatron.a import g\n")], project)
    assert (
        missing_names([sample("tools/b.py", "from megatron.a import f, x, json\nfrom megatron import a\n")], project)
        == []
    )
