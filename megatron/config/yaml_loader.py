"""Loads and merges configuration files and flags into one flat mapping, with the location of each value.

Any number of YAML or JSON files, in any order: no file overrides another. A key is the same key with dashes or
underscores; giving it twice, in one file or in two, is an error that names both locations. The command line overrides
files. JSON is parsed as YAML too, so trailing commas are allowed in it, and comments (`#`, `//`, `/* */`) are removed.
Numbers such as 2e-5, which YAML 1.1 reads as text, are numbers here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron.errors import ConfigIssue

COMMAND_LINE = "command line"
SUFFIXES = (".yml", ".yaml", ".json")

_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class YamlLoader(_SafeLoader):  # type: ignore[misc, valid-type]
    """The safe YAML loader with the numbers of YAML 1.2: 2e-5 is one; 1:30 and 010 (90 and 8 in YAML 1.1) are text."""


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_MERGE = "tag:yaml.org,2002:merge"
YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in {_INT, _FLOAT}]
    for first, resolvers in _SafeLoader.yaml_implicit_resolvers.items()
}
YamlLoader.add_implicit_resolver(
    _INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)$"), list("-+0123456789")
)
YamlLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9][0-9_]*|[0-9][0-9_]*\.?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)$"
        r"|^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class SourcedValue:
    """A value with its source."""

    value: Any
    """The value as the user wrote it."""
    location: str
    """`file:line` or "command line"."""


@dataclass
class MergedConfig:
    """The merged content of all files and flags."""

    values: dict[str, SourcedValue] = field(default_factory=dict)
    """Key -> value."""
    issues: list[ConfigIssue] = field(default_factory=list)
    """Errors found while reading."""
    conflicting: list[ConfigIssue] = field(default_factory=list)
    """Errors of keys with two different values, a part of `issues`."""
    unreadable: bool = False
    """Whether some file could not be read, so that missing keys may be in it."""
    texts: dict[str, str] = field(default_factory=dict)
    """File name -> its text, stored in the run directory and in checkpoints."""


def normalize_key(name: str) -> str:
    """Returns the key with underscores."""
    return name.strip().replace("-", "_")


def read_value(text: str) -> Any:
    """Parses a command line value as YAML, or JSON; text that is neither is returned verbatim."""
    for written in (text, _JSON_PARTS.sub(lambda found: _yaml_string(found[0]), text)):
        with suppress(yaml.YAMLError):
            return yaml.load(written, Loader=YamlLoader)  # noqa: S506 (Loader is a safe loader)
    return text


def merge(files: Sequence[str | os.PathLike[str]], flags: Mapping[str, Any] | None = None) -> MergedConfig:
    """Reads every file, then the flags. Errors are collected, not raised."""
    merged = MergedConfig()
    seen: set[Path] = set()
    for name in files:
        path = find_file(name)
        if path is not None and path.resolve() in seen:
            merged.issues.append(ConfigIssue("the file is named twice", location=str(path), hint="name it once"))
            continue
        seen |= {path.resolve()} if path else set()
        if path is None:
            merged.issues.append(_missing_file_issue(name))
            merged.unreadable = True
            continue
        _read_file(path, merged)
    for name, value in (flags or {}).items():
        merged.values[normalize_key(name)] = SourcedValue(value, COMMAND_LINE)
    return merged


def find_file(name: str | os.PathLike[str]) -> Path | None:
    """Returns the file of that name, whose suffix may be left out; None when there is none."""
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix not in SUFFIXES:
        for suffix in SUFFIXES:
            candidate = path.with_name(path.name + suffix)
            if candidate.is_file():
                return candidate
    return None


def _missing_file_issue(name: str | os.PathLike[str]) -> ConfigIssue:
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


def _read_file(path: Path, merged: MergedConfig) -> None:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        merged.issues.append(ConfigIssue(f"the file cannot be read: {error}", location=str(path)))
        merged.unreadable = True
        return
    merged.texts[_unique_name(path.name, merged.texts)] = text
    if path.suffix == ".json":
        text = _json_as_yaml(text)
    try:
        _read_text(text, str(path), merged)
    except yaml.YAMLError as error:
        merged.issues.append(_syntax_issue(error, path, text))
        merged.unreadable = True
    except (ValueError, RecursionError) as error:
        merged.issues.append(ConfigIssue(f"the file cannot be read: {error}", location=str(path)))
        merged.unreadable = True


_JSON_PARTS = re.compile(r'"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|/\*.*?\*/|//[^\n]*|#[^\n]*|\t', re.DOTALL)
"""Strings, and what is no JSON outside of strings: comments and tabs."""


_NO_ASCII = re.compile(r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|\\.|[^\x00-\x7e]", re.DOTALL)
"""In a string of JSON: a character in two escapes, any other escape, and characters outside of ASCII."""


def _json_as_yaml(text: str) -> str:
    """Replaces comments, and tabs between values, by blanks, and writes strings as YAML does. Lines stay lines."""
    return _JSON_PARTS.sub(_json_part, text)


def _json_part(found: re.Match[str]) -> str:
    return _yaml_string(found[0]) if found[0][0] in "\"'" else re.sub(r"[^\n]", " ", found[0])


def _yaml_string(part: str) -> str:
    return _NO_ASCII.sub(_yaml_escape, part) if part[0] == '"' else part


def _yaml_escape(found: re.Match[str]) -> str:
    """Returns one escape a character: YAML knows no surrogates, and takes some characters for ends of lines."""
    high, low = found.groups()
    if high is not None:
        return f"\\U{0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00:08x}"
    return found[0] if found[0][0] == "\\" else f"\\U{ord(found[0]):08x}"


def _unique_name(name: str, taken: Mapping[str, str]) -> str:
    stem, dot, suffix = name.partition(".")
    number = 2
    while name in taken:
        name = f"{stem}-{number}{dot}{suffix}"
        number += 1
    return name


def _syntax_issue(error: yaml.YAMLError, path: Path, text: str) -> ConfigIssue:
    """Describes a syntax error; detects the two most common ones, which PyYAML reports badly."""
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark is not None else None
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    what = f"this is not {'JSON' if path.suffix == '.json' else 'YAML'}: {problem}"
    hint = "correct the line, or the one before it"
    if path.suffix == ".json" and "Unicode character" in problem:
        what, hint = (
            "this is not text: an escape is half of a character, without the other half",
            "write the character itself",
        )
    for number, written in enumerate(text.splitlines()[:line], 1):
        if re.match(r" *\t", written) and number == line:
            what, hint = "there is a tab at the start of the line", "YAML takes spaces there"
        elif path.suffix != ".json" and re.match(r"[A-Za-z_-]+:[^\s:]", written):
            line, what, hint = number, "there is no space after the colon", "write `key: value`"
            break
    location = f"{path}:{line}" if line is not None else str(path)
    return ConfigIssue(what, location=location, hint=hint)


def _read_text(text: str, name: str, merged: MergedConfig) -> None:
    loader = YamlLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            issue = ConfigIssue(
                "the file is not a mapping of keys to values", location=name, hint="write `key: value` lines"
            )
            merged.issues.append(issue)
            merged.unreadable = True
            return
        for key_node, value_node in _merged_pairs(root, loader):
            location = f"{name}:{key_node.start_mark.line + 1}"
            _find_nested_duplicates(value_node, name, merged)
            _add_pair(loader.construct_object(key_node, deep=True), value_node, location, loader, merged)
    finally:
        loader.dispose()


def _merged_pairs(root: yaml.MappingNode, loader: Any) -> list[tuple[yaml.Node, yaml.Node]]:
    """Returns the pairs of the file; its own override those of a merge key (`<<`)."""
    own = [pair for pair in root.value if pair[0].tag != _MERGE]
    names = {normalize_key(str(key.value)) for key, _ in own}
    root.value = [pair for pair in root.value if pair[0].tag == _MERGE]
    loader.flatten_mapping(root)
    brought = {normalize_key(str(key.value)): (key, value) for key, value in root.value}
    return own + [pair for name, pair in brought.items() if name not in names]


def _add_pair(key: Any, value_node: yaml.Node, location: str, loader: Any, merged: MergedConfig) -> None:
    if not isinstance(key, str):
        merged.issues.append(ConfigIssue(f"the key {key!r} is not text", location=location))
        return
    normal = normalize_key(key)
    value = loader.construct_object(value_node, deep=True)
    before = merged.values.get(normal)
    if before is not None:
        issue = ConfigIssue(
            f"the key is also given at {before.location}, as {before.value!r}",
            key=normal,
            value=value,
            location=location,
            hint="keep one of the two",
        )
        merged.issues.append(issue)
        if value != before.value:
            merged.conflicting.append(issue)
        return
    merged.values[normal] = SourcedValue(value, location)


def _find_nested_duplicates(node: yaml.Node, name: str, merged: MergedConfig, depth: int = 0) -> None:
    if isinstance(node, yaml.SequenceNode) and depth < 50:
        for item in node.value:
            _find_nested_duplicates(item, name, merged, depth + 1)
    if not isinstance(node, yaml.MappingNode) or depth >= 50:
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value)
        if key in seen and key != "<<":
            issue = ConfigIssue(
                f"the key is also given at {name}:{seen[key]}",
                key=key,
                location=f"{name}:{line}",
                hint="keep one of the two",
            )
            merged.issues.append(issue)
        seen[key] = line
        _find_nested_duplicates(value_node, name, merged, depth + 1)
