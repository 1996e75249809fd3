"""Small kindnesses before the types are checked: whole numbers written as 1e5, the case of a choice, one-item lists,
`~` in paths.

Choices that do not exist are refused here, with the nearest one that does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.config import FIELDS, FieldInfo
from megatron.config.paths import PATH_KEYS, read_paths
from megatron.config.type_names import accepts, members
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
"""What other programs call a choice -> what it is here."""


def decode(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[ConfigIssue]]:
    """The values as the sections take them, and the choices that do not exist. Unknown keys are left out."""
    decoded: dict[str, Any] = {}
    issues: list[ConfigIssue] = []
    for name, value in values.items():
        if name not in FIELDS:
            continue
        facts = FIELDS[name]
        value = _coerce(facts, value)
        if facts.choices:
            value, found = _choose(facts, value)
            issues += found
        if name in PATH_KEYS:
            value, found = read_paths(name, value)
            issues += found
        decoded[name] = value
    return decoded, issues


def _coerce(facts: FieldInfo, value: Any) -> Any:
    kinds = members(facts.annotation)
    if isinstance(value, float) and int in kinds and float not in kinds and value.is_integer():
        return int(value)
    if isinstance(value, str) and accepts(facts.annotation, tuple) and str not in kinds:
        return [value]
    return value


def _choose(facts: FieldInfo, value: Any) -> tuple[Any, list[ConfigIssue]]:
    if isinstance(value, (list, tuple)):
        pairs = [_choose(facts, item) for item in value]
        return [item for item, _ in pairs], [issue for _, found in pairs for issue in found]
    if not isinstance(value, str) or value in facts.choices or (facts.name == "attention_config" and value == "all"):
        return value, []
    for choice in facts.choices:
        if choice.lower() == value.lower():
            return choice, []
    close = CHOICE_ALIASES.get((facts.name, value.lower())) or nearest_name(value, facts.choices)
    listed = ", ".join(facts.choices)
    hint = f"did you mean {close}? The choices are {listed}" if close else f"the choices are {listed}"
    return value, [ConfigIssue("there is no such choice", key=facts.name, value=value, hint=hint)]
