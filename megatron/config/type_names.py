"""Types and values in words, for error messages and the key reference."""

from __future__ import annotations

import math
import types
from typing import Annotated, Any, Union, get_args, get_origin

PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping {name: value}",
    type(None): "null",
}

SHORT = {bool: "bool", int: "int", float: "float", str: "str", dict: "mapping", type(None): "null"}


def members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type itself; Annotated is looked through."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in {Union, types.UnionType}:
        return tuple(member for part in get_args(annotation) for member in members(part))
    return (annotation,)


def item_type(annotation: Any) -> Any:
    """The type of a tuple's items."""
    return get_args(annotation)[0]


def accepts(annotation: Any, kind: type) -> bool:
    """Whether the key may hold that plain type (bool, int, float, str, dict or tuple)."""
    return any(member is kind or get_origin(member) is kind for member in members(annotation))


def type_in_words(annotation: Any) -> str:
    """What a value of this type is, as "a whole number or null"."""
    return _joined(annotation, PLAIN, "a list of {}", " or ")


def type_in_short(annotation: Any) -> str:
    """The type in a table's column, as "int or null"."""
    return _joined(annotation, SHORT, "list of {}", " or ")


def _joined(annotation: Any, names: dict[Any, str], list_form: str, glue: str) -> str:
    if annotation is Any:
        return "anything"
    words = []
    for member in members(annotation):
        if get_origin(member) is tuple:
            inner = item_type(member)
            words.append(list_form.format({str: "texts", int: "whole numbers", float: "numbers"}.get(inner, "values")))
        else:
            words.append(names[get_origin(member) or member])
    return glue.join(words)


def value_in_words(value: Any) -> str:
    """The kind of a value, as "text" or "a list"."""
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    for kind in (bool, int, float, str, dict):
        if isinstance(value, kind):
            return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, PLAIN[kind])
    return "null" if value is None else f"a {type(value).__name__}"
