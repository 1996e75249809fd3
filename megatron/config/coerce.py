"""Lenient coercion before type checks: 1e5 as int, case-insensitive choices, single items as lists, `~` in paths.

Choices that do not exist are rejected here, with the nearest one that does, and so is `None` where null is meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.config import FIELDS, FieldInfo
from megatron.config.paths import PATH_KEYS, expand_paths
from megatron.config.type_names import allows_type, union_members
from megatron.errors import ConfigIssue
from megatron.registry import nearest_name

CHOICE_ALIASES = {
    ("pos_emb", "rope"): "rotary",
    ("pos_emb", "absolute"): "learned",
    ("precision", "bf16"): "bfloat16",
    ("precision", "half"): "fp16",
    ("precision", "float16"): "fp16",
    ("precision", "float32"): "fp32",
    ("attention_config", "dense"): "global",
    ("lr_decay_style", "none"): "constant",
}
"""(key, a choice's name in other programs) -> its name here."""


def coerce(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[ConfigIssue]]:
    """Coerces the values to the types of their keys; returns them with the issues. Unknown keys are left out."""
    coerced: dict[str, Any] = {}
    issues: list[ConfigIssue] = []
    for name, value in values.items():
        if name not in FIELDS:
            continue
        field = FIELDS[name]
        if _is_none_as_text(field, value):
            nullable = allows_type(field.annotation, type(None))
            hint = "write null, or leave the key out" if nullable else "leave the key out"
            issues.append(ConfigIssue("this is Python's spelling", key=name, value=value, hint=hint))
            continue
        value = _coerce(field, value)
        if field.choices:
            value, found = _choose(field, value)
            issues += found
        if name in PATH_KEYS:
            value, found = expand_paths(name, value)
            issues += found
        coerced[name] = value
    return coerced, issues


def _is_none_as_text(field: FieldInfo, value: Any) -> bool:
    """Whether a key of text, or of a list, that may be null or is empty by default has the text None."""
    text = allows_type(field.annotation, str) or allows_type(field.annotation, tuple)
    may_be_nothing = allows_type(field.annotation, type(None)) or field.default == ""
    return text and may_be_nothing and value in ("None", ["None"], ("None",))


def _coerce(field: FieldInfo, value: Any) -> Any:
    kinds = union_members(field.annotation)
    if isinstance(value, float) and int in kinds and float not in kinds and value.is_integer():
        return int(value)
    if isinstance(value, str) and allows_type(field.annotation, tuple) and str not in kinds:
        return [value]
    return value


def _choose(field: FieldInfo, value: Any) -> tuple[Any, list[ConfigIssue]]:
    if isinstance(value, (list, tuple)):
        pairs = [_choose(field, item) for item in value]
        return [item for item, _ in pairs], [issue for _, found in pairs for issue in found]
    if not isinstance(value, str) or value in field.choices or (field.name == "attention_config" and value == "all"):
        return value, []
    for choice in field.choices:
        if choice.lower() == value.lower():
            return choice, []
    close = CHOICE_ALIASES.get((field.name, value.lower())) or nearest_name(value, field.choices)
    listed = ", ".join(field.choices)
    hint = f"did you mean {close}? The choices are {listed}" if close else f"the choices are {listed}"
    return value, [ConfigIssue("there is no such choice", key=field.name, value=value, hint=hint)]
