"""Every key as a flag: `--train-iters 100`, `--train_iters=100`.

A value is read as YAML, so `--optimizer '{type: Adam, params: {lr: 1e-4}}'` works; the value of a text key is taken
verbatim. A boolean key needs no value. A list key takes every value up to the next flag; texts of a list are taken
verbatim too, but for one value alone that is a list itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, get_origin

from megatron.config.config import FIELDS, FieldInfo
from megatron.config.type_names import allows_type, item_type, type_name, union_members
from megatron.config.yaml_loader import COMMAND_LINE, find_file, normalize_key, read_value
from megatron.errors import ConfigIssue
from megatron.registry import nearest_name

NUMBER = re.compile(r"^-[0-9.]")
ANY_TEXT = frozenset({"stop", "task_labels", "comet_tags"})
"""Keys whose texts may begin with a bracket, as [INST] does; one value that is a list has them in quotes, as JSON."""


@dataclass(frozen=True)
class Flags:
    """Parsed command line flags."""

    values: dict[str, Any]
    """Key -> value."""
    rest: list[str]
    """Arguments that are no flag of a key, in their order."""
    issues: list[ConfigIssue]
    """Spelling errors."""


def read_flags(arguments: Sequence[str], others: Iterable[str] = ()) -> Flags:
    """Extracts the flags of configuration keys from the arguments.

    Short flags, positional arguments and the flags of `others` stay in `rest`. Any other long flag that names no key is
    an error, as is a key given twice.

    Args:
        arguments: the command line.
        others: long flags of the caller, such as "--dry-run".
    """
    own = {normalize_key(name.lstrip("-")) for name in others}
    values: dict[str, Any] = {}
    rest: list[str] = []
    issues: list[ConfigIssue] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if argument == "--":
            rest += arguments[position:]
            break
        if not argument.startswith("--"):
            rest.append(argument)
            continue
        written, equals, text = argument[2:].partition("=")
        name = normalize_key(written)
        if name in own:
            rest.append(argument)
            continue
        if name not in FIELDS:
            issues.append(_unknown_flag(written, own))
            position += 0 if equals else len(_values_of_unknown(name, arguments, position))
            continue
        if name in values:
            issues.append(ConfigIssue("the flag is given twice", key=f"--{written}", hint="keep one of the two"))
        if equals:
            values[name] = flag_value(FIELDS[name], text)
            continue
        taken = _values_after(FIELDS[name], arguments, position)
        position += len(taken)
        if not taken and not allows_type(FIELDS[name].annotation, bool):
            expected = type_name(FIELDS[name].annotation)
            issues.append(ConfigIssue("the flag needs a value", key=f"--{written}", hint=f"give {expected}"))
            continue
        values[name] = _join_values(FIELDS[name], taken)
    return Flags(values, rest, [replace(issue, location=COMMAND_LINE) for issue in issues])


def flag_value(field: FieldInfo, text: str) -> Any:
    """Parses the value of one flag: text for a text key, else YAML."""
    kinds = [member for member in union_members(field.annotation) if member is not type(None)]
    if kinds == [str]:
        return None if text in {"null", "~"} else text
    if _lists_texts(field):
        return _texts(field, [text])
    return read_value(text)


def _values_of_unknown(name: str, arguments: Sequence[str], start: int) -> list[str]:
    """Returns the arguments after an unknown flag that belong to it: by the nearest key, else one that is no file."""
    close = nearest_name(name, FIELDS)
    if close:
        following = _values_after(FIELDS[close], arguments, start)
    else:
        following = [] if start >= len(arguments) or _is_flag(arguments[start]) else [arguments[start]]
    return list(takewhile(lambda text: find_file(text) is None and not text.endswith(".py"), following))


def _values_after(field: FieldInfo, arguments: Sequence[str], start: int) -> list[str]:
    """Returns the arguments from `start` on that are values of this key."""
    if allows_type(field.annotation, tuple):
        taken = []
        for argument in arguments[start:]:
            if _is_flag(argument):
                break
            taken.append(argument)
        return taken
    if start >= len(arguments) or _is_flag(arguments[start]):
        return []
    if allows_type(field.annotation, bool) and not isinstance(read_value(arguments[start]), (bool, type(None))):
        return []
    return [arguments[start]]


def _is_flag(argument: str) -> bool:
    return argument.startswith("-") and len(argument) > 1 and not NUMBER.match(argument)


def _join_values(field: FieldInfo, taken: list[str]) -> Any:
    if not taken:
        return True
    if not allows_type(field.annotation, tuple):
        return flag_value(field, taken[0])
    if _lists_texts(field):
        return _texts(field, taken)
    read = [read_value(text) for text in taken]
    if len(read) == 1 and (isinstance(read[0], list) or read[0] is None):
        return read[0]
    if allows_type(field.annotation, str) and len(read) == 1:
        return taken[0]
    return read


def _lists_texts(field: FieldInfo) -> bool:
    """Whether it is a list of texts and of nothing else."""
    return any(get_origin(each) is tuple and item_type(each) is str for each in union_members(field.annotation))


def _texts(field: FieldInfo, taken: list[str]) -> Any:
    """The values of a key that lists texts: each as it is, or null, or one list."""
    if len(taken) > 1:
        return taken
    (text,) = taken
    if text in {"null", "~"}:
        return None
    if field.name in ANY_TEXT:
        read = _json(text)
    else:
        read = read_value(text) if text.lstrip().startswith("[") else text
    if isinstance(read, list):
        return read
    return text if allows_type(field.annotation, str) else [text]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _unknown_flag(written: str, own: set[str]) -> ConfigIssue:
    close = nearest_name(normalize_key(written), [*FIELDS, *own])
    hint = f"did you mean --{close}?" if close else "configs/README.md lists every key"
    return ConfigIssue("there is no such flag", key=f"--{written}", hint=hint)
