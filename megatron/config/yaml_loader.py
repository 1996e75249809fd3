"""Files and command line -> one flat mapping, in which each value knows where it stands.

Any number of YAML or JSON files, in any order: no file overrides another. A key is the same key with dashes or
underscores, and giving it twice is an error that names both places, in one file or in two. The command line wins
over files. JSON is read by the YAML reader as well, so trailing commas are allowed in it, and comments (`#`, `//`,
`/* */`) are taken out. Numbers such as 2e-5, text in YAML 1.1, are numbers here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron.errors import ConfigIssue

COMMAND_LINE = "command line"
SUFFIXES = (".yml", ".yaml", ".json")

_Base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Loader(_Base):  # type: ignore[misc, valid-type]
    """The safe YAML loader, with the numbers of YAML 1.2: 2e-5 is one; 1:30 and 010, which YAML 1.1 reads as 90 and
    8, are text.
    """


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_MERGE = "tag:yaml.org,2002:merge"
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in {_INT, _FLOAT}]
    for first, resolvers in _Base.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    _INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)$"), list("-+0123456789")
)
Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9][0-9_]*|[0-9][0-9_]*\.?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)$"
        r"|^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class SourcedValue:
    """A value that the user wrote, and where: `file:line` or "command line"."""

    value: Any
    location: str


@dataclass
class Merged:
    """What all sources together say. texts: the source of each file by name, kept for the run's record.

    doubtful: the errors of keys that were given two different values. unreadable: some file could not be read, so a
    key that stands nowhere else may be there.
    """

    values: dict[str, SourcedValue] = field(default_factory=dict)
    issues: list[ConfigIssue] = field(default_factory=list)
    doubtful: list[ConfigIssue] = field(default_factory=list)
    unreadable: bool = False
    texts: dict[str, str] = field(default_factory=dict)


def normal_name(name: str) -> str:
    """The one spelling of a key: underscores."""
    return name.strip().replace("-", "_")


def read_value(text: str) -> Any:
    """A command line value, read as YAML; text that is not YAML is taken as it stands."""
    try:
        return yaml.load(text, Loader=Loader)  # noqa: S506 (Loader is a safe loader)
    except yaml.YAMLError:
        return text


def merge(files: Sequence[str | os.PathLike[str]], flags: Mapping[str, Any] | None = None) -> Merged:
    """Reads every file, then the flags. Errors are collected, not raised."""
    merged = Merged()
    seen: set[Path] = set()
    for name in files:
        path = find_file(name)
        if path is not None and path.resolve() in seen:
            merged.issues.append(ConfigIssue("the file is named twice", location=str(path), hint="name it once"))
            continue
        seen |= {path.resolve()} if path else set()
        if path is None:
            merged.issues.append(_no_such_file(name))
            merged.unreadable = True
            continue
        _read_file(path, merged)
    for name, value in (flags or {}).items():
        merged.values[normal_name(name)] = SourcedValue(value, COMMAND_LINE)
    return merged


def find_file(name: str | os.PathLike[str]) -> Path | None:
    """The file of that name; the suffix may be left out. None where there is none."""
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix not in SUFFIXES:
        for suffix in SUFFIXES:
            candidate = path.with_name(path.name + suffix)
            if candidate.is_file():
                return candidate
    return None


def _no_such_file(name: str | os.PathLike[str]) -> ConfigIssue:
    path = Path(name)
    if path.is_dir():
        return ConfigIssue("this is a folder, not a configuration file", location=str(name))
    folder = path.parent
    known = [entry.name for entry in folder.iterdir() if entry.suffix in SUFFIXES] if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, [*known, *(Path(one).stem for one in known)], n=1)
    return ConfigIssue(
        "there is no such configuration file",
        location=str(name),
        hint=f"did you mean {folder / close[0]}?" if close else "check the name and the folder",
    )


def _read_file(path: Path, merged: Merged) -> None:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        merged.issues.append(ConfigIssue(f"the file cannot be read: {error}", location=str(path)))
        merged.unreadable = True
        return
    merged.texts[_free_name(path.name, merged.texts)] = text
    if path.suffix == ".json":
        text = _plain_json(text)
    try:
        _read_text(text, str(path), merged)
    except yaml.YAMLError as error:
        merged.issues.append(_syntax_issue(error, path, text))
        merged.unreadable = True
    except (ValueError, RecursionError) as error:
        merged.issues.append(ConfigIssue(f"the file cannot be read: {error}", location=str(path)))
        merged.unreadable = True


_JSON_PARTS = re.compile(r'"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|/\*.*?\*/|//[^\n]*|#[^\n]*|\t', re.DOTALL)
"""Strings, which stay as they are, and what is outside of them and is no JSON: comments and tabs."""


def _plain_json(text: str) -> str:
    """JSON as the YAML reader takes it: blanks in place of comments and of tabs between values; lines stay lines."""
    return _JSON_PARTS.sub(lambda found: found[0] if found[0][0] in "\"'" else re.sub(r"[^\n]", " ", found[0]), text)


def _free_name(name: str, taken: Mapping[str, str]) -> str:
    stem, dot, suffix = name.partition(".")
    number = 2
    while name in taken:
        name = f"{stem}-{number}{dot}{suffix}"
        number += 1
    return name


def _syntax_issue(error: yaml.YAMLError, path: Path, text: str) -> ConfigIssue:
    """What is not YAML, in words; the two most frequent slips are looked for, since the reader tells of neither."""
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark is not None else None
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    what = f"this is not {'JSON' if path.suffix == '.json' else 'YAML'}: {problem}"
    hint = "mend the line, or the one before it"
    for number, written in enumerate(text.splitlines()[:line], 1):
        if re.match(r" *\t", written) and number == line:
            what, hint = "a tab stands at the start of the line", "YAML takes spaces there"
        elif path.suffix != ".json" and re.match(r"[A-Za-z_-]+:[^\s:]", written):
            line, what, hint = number, "there is no space after the colon", "write `key: value`"
            break
    location = f"{path}:{line}" if line is not None else str(path)
    return ConfigIssue(what, location=location, hint=hint)


def _read_text(text: str, name: str, merged: Merged) -> None:
    loader = Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            told = ConfigIssue(
                "the file is not a mapping of keys to values", location=name, hint="write `key: value` lines"
            )
            merged.issues.append(told)
            merged.unreadable = True
            return
        for key_node, value_node in _merged_pairs(root, loader):
            location = f"{name}:{key_node.start_mark.line + 1}"
            _nested_duplicates(value_node, name, merged)
            _add(loader.construct_object(key_node, deep=True), value_node, location, loader, merged)
    finally:
        loader.dispose()


def _merged_pairs(root: yaml.MappingNode, loader: Any) -> list[tuple[yaml.Node, yaml.Node]]:
    """The pairs of the file; those that a merge key (`<<`) brings stand back behind the file's own."""
    own = [pair for pair in root.value if pair[0].tag != _MERGE]
    names = {normal_name(str(key.value)) for key, _ in own}
    root.value = [pair for pair in root.value if pair[0].tag == _MERGE]
    loader.flatten_mapping(root)
    brought = {normal_name(str(key.value)): (key, value) for key, value in root.value}
    return own + [pair for name, pair in brought.items() if name not in names]


def _add(key: Any, value_node: yaml.Node, location: str, loader: Any, merged: Merged) -> None:
    if not isinstance(key, str):
        merged.issues.append(ConfigIssue(f"the key {key!r} is not text", location=location))
        return
    normal = normal_name(key)
    value = loader.construct_object(value_node, deep=True)
    before = merged.values.get(normal)
    if before is not None:
        told = ConfigIssue(
            f"the key is also given at {before.location}, as {before.value!r}",
            key=normal,
            value=value,
            location=location,
            hint="keep one of the two",
        )
        merged.issues.append(told)
        if value != before.value:
            merged.doubtful.append(told)
        return
    merged.values[normal] = SourcedValue(value, location)


def _nested_duplicates(node: yaml.Node, name: str, merged: Merged, depth: int = 0) -> None:
    if isinstance(node, yaml.SequenceNode) and depth < 50:
        for item in node.value:
            _nested_duplicates(item, name, merged, depth + 1)
    if not isinstance(node, yaml.MappingNode) or depth >= 50:
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value)
        if key in seen and key != "<<":
            told = ConfigIssue(
                f"the key is also given at {name}:{seen[key]}",
                key=key,
                location=f"{name}:{line}",
                hint="keep one of the two",
            )
            merged.issues.append(told)
        seen[key] = line
        _nested_duplicates(value_node, name, merged, depth + 1)
