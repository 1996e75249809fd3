"""A law about the laws: every path and room that one of them lists exists, or it guards nothing."""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.architecture.source import FOLDERS, ROOT
from tests.architecture.test_floors import FLOORS, PACKAGES_OF

A_PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*")


def strings(value: Any) -> Iterator[str]:
    """Every text in a constant: in tuples, sets and mappings too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for pair in value.items() for part in pair for text in strings(part))
    elif isinstance(value, tuple | list | frozenset | set):
        yield from (text for part in value for text in strings(part))


def dead_paths(constants: Mapping[str, Any], root: Path = ROOT) -> list[str]:
    """Paths in constants that are not there; one that ends in a slash is a folder."""
    found = []
    for name, value in constants.items():
        for text in strings(value) if name.isupper() else ():
            there = (root / text).is_dir() if text.endswith("/") else (root / text).is_file()
            if A_PATH.fullmatch(text) and not there:
                found.append(f"{name} lists {text}, which is not there")
    return found


def dead_rooms(names: Mapping[str, Any], root: Path = ROOT) -> list[str]:
    """Rooms that are neither a folder nor a file of megatron/."""
    rooms = ((name, root / "megatron" / name) for name in names)
    return [name for name, path in rooms if not path.is_dir() and not path.with_suffix(".py").is_file()]


def test_every_path_that_a_law_lists_exists() -> None:
    modules = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    found = {name: vars(importlib.import_module(f"tests.architecture.{name}")) for name in modules}
    assert "megatron/config/validation/" in set(strings(found["test_safety"]["USERS_VALUES"]))
    assert [f"{name}.py: {line}" for name, constants in found.items() for line in dead_paths(constants)] == []


def test_every_room_that_a_law_lists_exists() -> None:
    assert dead_rooms({**FLOORS, **PACKAGES_OF}) == []


def test_every_module_that_the_type_checker_is_strict_with_exists() -> None:
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    named = [name for override in overrides for name in override["module"] if name.startswith("megatron.")]
    assert named
    assert dead_rooms({name.removeprefix("megatron."): None for name in named if not name.endswith(".*")}) == []
    folders = [name.removesuffix(".*").replace(".", "/") for name in named if name.endswith(".*")]
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


def test_dead_path_law_can_complain(tmp_path: Path) -> None:
    (tmp_path / "megatron" / "config" / "validation").mkdir(parents=True)
    (tmp_path / "megatron" / "errors.py").touch()
    good = {
        "LAW": ("megatron/config/validation/", {"key": frozenset({"megatron/errors.py"})}, "any text", "tools"),
        "x": "tools/",
    }
    assert dead_paths(good, tmp_path) == []
    assert dead_paths({"LAW": ("megatron/config/rules.py",)}, tmp_path)
    assert dead_paths({"LAW": {"key": "megatron/config/derived/"}}, tmp_path)
    assert dead_paths({"LAW": {"megatron/errors.py/": 1}}, tmp_path)
    assert dead_rooms({"errors": 0, "config": 1}, tmp_path) == []
    assert dead_rooms({"warnings": 0}, tmp_path) == ["warnings"]
