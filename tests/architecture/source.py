"""Reads the project's own source, for tests of its structure without importing it.

A law is a function from one `Source` (or all of them) to complaints, each a line `path:line: what is wrong`. Every law
is tested twice: the project has no complaint, and a small bad sample has one, so that a law which sees nothing fails.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megatron", "tools", "benchmarks", "examples", "tests")


@dataclass(frozen=True)
class Source:
    """One Python file: `path` relative to the project, with forward slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        """The dotted name; a package's `__init__.py` carries the package's name."""
        parts = self.path.removesuffix(".py").split("/")
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def is_entry_point(self) -> bool:
        """Whether the file is started as a program: the scripts at the top, tools/ and benchmarks/."""
        return "/" not in self.path or self.path.startswith(("tools/", "benchmarks/"))

    @property
    def is_product(self) -> bool:
        """Whether this file is the framework or one of its entry points, not a test."""
        return not self.path.startswith("tests/")

    def within(self, *paths: str) -> bool:
        """Whether the file is one of the paths or is in one: "megatron/config/", "megatron/engine/builder.py"."""
        return any(self.path == path or (path.endswith("/") and self.path.startswith(path)) for path in paths)

    def complaint(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"


@dataclass(frozen=True)
class Import:
    """One imported name: `module` as written, `name` what is taken from it (None for a plain import)."""

    module: str
    name: str | None
    node: ast.AST

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def target(self, modules: frozenset[str]) -> str:
        """The module meant: `from a.b import c` means a.b.c where that is a module, else a.b."""
        full = f"{self.module}.{self.name}"
        return full if self.name and full in modules else self.module


def imports(source: Source) -> Iterator[Import]:
    """Every import, also inside functions, under TYPE_CHECKING and by `importlib.import_module("name")`."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = source.module.split(".")
                if not source.path.endswith("__init__.py"):
                    package = package[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([base] if base else [])])
            for alias in node.names:
                yield Import(base, alias.name, node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"importlib.import_module", "import_module"}:
            named = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            yield from (Import(str(name), None, node) for name in named)


def project() -> tuple[Source, ...]:
    """Every Python file of the project."""
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    return tuple(
        Source(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
        for file in sorted(files)
        if not any(part.startswith((".", "__pycache__")) for part in file.relative_to(ROOT).parts)
    )


PROJECT = project()
PRODUCT = tuple(source for source in PROJECT if source.is_product)


def sample(path: str, text: str) -> Source:
    """A made-up file, to show that a law can complain."""
    return Source(path, text)
