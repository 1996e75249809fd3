"""Human-readable type names, for error messages and the key reference."""

from __future__ import annotations

import math
import types
from typing import Annotated, Any, Union, get_args, get_origin

LONG_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping {name: value}",
    type(None): "null",
}

SHORT_NAMES = {bool: "bool", int: "int", float: "float", str: "str", dict: "mapping", type(None): "null"}


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Returns the types of a union, or the single type; Annotated is unwrapped."""
    if get_origin(annotation) is Annotated:
        return union_members(get_args(annotation)[0])
    if get_origin(annotation) in {Union, types.UnionType}:
        return tuple(member for part in get_args(annotation) for member in union_members(part))
    return (annotation,)


def item_type(annotation: Any) -> Any:
    """Returns the type of a tuple's items."""
    return get_args(annotation)[0]


def allows_type(annotation: Any, kind: type) -> bool:
    """Returns whether a key of this type allows that plain type (bool, int, float, str, dict or tuple)."""
    return any(member is kind or get_origin(member) is kind for member in union_members(annotation))


def type_name(annotation: Any) -> str:
    """Names the type in a sentence, as "a whole number or null"."""
    return _join_names(annotation, LONG_NAMES, "a list of {}", " or ")


def short_type_name(annotation: Any) -> str:
    """Names the type in a table, as "int or null"."""
    return _join_names(annotation, SHORT_NAMES, "list of {}", " or ")


def _join_names(annotation: Any, names: dict[Any, str], list_form: str, glue: str) -> str:
    if annotation is Any:
        return "anything"
    words = []
    for member in union_members(annotation):
        if get_origin(member) is tuple:
            inner = item_type(member)
            words.append(list_form.format({str: "texts", int: "whole numbers", float: "numbers"}.get(inner, "values")))
        else:
            words.append(names[get_origin(member) or member])
    return glue.join(words)


def value_type_name(value: Any) -> str:
    """Names the type of a value, as "text" or "a list"."""
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    for kind in (bool, int, float, str, dict):
        if isinstance(value, kind):
            return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, LONG_NAMES[kind])
    return "null" if value is None else f"a {type(value).__name__}"
