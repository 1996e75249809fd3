"""Reads the optimizer block, and derives the keys that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron.errors import ConfigError, ConfigIssue
from megatron.registry import OPTIMIZERS, Setting, nearest_name

DEFAULT_LR = 1.0e-3

COMMON: Mapping[str, Setting] = MappingProxyType(
    {
        "lr": Setting("number"),
        "weight_decay": Setting("number"),
        "max_grad_norm": Setting("number", unused="gradient_clipping decides"),
    }
)
"""Parameters that every optimizer has."""


@dataclass(frozen=True)
class OptimizerChoice:
    """A valid optimizer block."""

    block: dict[str, Any]
    """{type, params}."""
    kind: str
    """The type in lower case."""
    lr: float
    """Maximum learning rate."""
    weight_decay: float | None
    """Weight decay of params; None where it is not given there."""


def derive_optimizer(
    block: dict[str, Any] | None, kind: str | None, lr: float | None, choices: tuple[str, ...]
) -> OptimizerChoice:
    """Reads the optimizer block, or makes one from `optimizer_type` and `lr`.

    Raises ConfigError for an unknown type, wrong parameters or a contradiction.

    Args:
        block: the key optimizer.
        kind: the user's optimizer_type, or None.
        lr: the user's lr, or None.
        choices: names of optimizers.
    """
    if block is None:
        block = {"type": kind or "adam", "params": {"lr": DEFAULT_LR if lr is None else lr}}
    ConfigError.raise_any(_form_issues(block))
    found_kind, params = str(block["type"]).lower(), block["params"]
    found_lr = params.get("lr", DEFAULT_LR if lr is None else lr)
    issues = [
        *_kind_issues(block["type"], choices),
        *(_contradiction("optimizer_type", kind, found_kind, block) if found_kind in choices else ()),
        *_contradiction("lr", lr, found_lr, block),
        *_wrong_values(found_kind, block),
        *(_unknown_params(found_kind, params, block) if found_kind in choices else ()),
    ]
    ConfigError.raise_any(issues)
    decay = params.get("weight_decay")
    return OptimizerChoice(block, found_kind, float(found_lr), None if decay is None else float(decay))


def params_without_effect(choice: OptimizerChoice) -> dict[str, str]:
    """Returns the params without effect and the reasons, in the order of the block."""
    known = _settings(choice.kind)
    reasons = {name: known[name].unused for name in choice.block["params"]}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _settings(kind: str) -> dict[str, Setting]:
    """Returns the settings of an optimizer; the common ones where the optimizer does not exist."""
    return {**COMMON, **(OPTIMIZERS.entry(kind).settings if kind in OPTIMIZERS else {})}


def _form_issues(block: dict[str, Any]) -> list[ConfigIssue]:
    hint = "write {type: Adam, params: {lr: 6.0e-4}}"
    errors = ["the block names no type"] if not isinstance(block.get("type"), str) else []
    errors += ["the block has no params"] if not isinstance(block.get("params"), dict) else []
    return [ConfigIssue(what, key="optimizer", value=block, hint=hint) for what in errors]


def _kind_issues(kind: str, choices: tuple[str, ...]) -> list[ConfigIssue]:
    if kind.lower() in choices:
        return []
    close = "adam, whose weight decay is decoupled" if kind.lower() == "adamw" else nearest_name(kind, choices)
    listed = f"the choices are {', '.join(choices)}"
    hint = f"did you mean {close}? Otherwise {listed}" if close else listed
    return [ConfigIssue("there is no optimizer of this type", key="optimizer", value=kind, hint=hint)]


def _contradiction(key: str, given: object, found: object, block: dict[str, Any]) -> list[ConfigIssue]:
    if given is None or given == found:
        return []
    return [ConfigIssue(f"optimizer says {found!r}: {block!r}", key=key, value=given, hint="leave one of the two out")]


def _unknown_params(kind: str, params: dict[str, Any], block: dict[str, Any]) -> list[ConfigIssue]:
    issues = []
    known = _settings(kind)
    for name in params:
        if name not in known:
            close = nearest_name(str(name), known)
            hint = f"did you mean {close}?" if close else f"the parameters are {', '.join(known)}"
            issues.append(ConfigIssue(f"{kind} has no parameter {name}", key="optimizer", value=block, hint=hint))
    return issues


def _wrong_values(kind: str, block: dict[str, Any]) -> list[ConfigIssue]:
    """Returns the issues of values of a wrong kind, for parameters that the optimizer has."""
    known = _settings(kind)
    issues = [_issue(name, value, known[name]) for name, value in block["params"].items() if name in known]
    return [ConfigIssue(what, key="optimizer", value=block, hint=hint) for what, hint in filter(None, issues)]


def _issue(name: str, value: Any, setting: Setting) -> tuple[str, str] | None:
    """Returns message and hint of an invalid value; None for a valid one."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if setting.kind in ("number", "fraction") and not number:
        return f"{name} = {value!r} is not a finite number", "write it as 0.001 or 1.0e-8"
    if setting.kind == "fraction" and not 0 <= value < 1:
        return f"{name} = {value!r} is not in [0, 1)", "such as 0.9"
    if setting.kind == "count" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        return f"{name} = {value!r} is not a number of steps", "write a whole number above 0"
    if setting.kind == "switch" and not isinstance(value, bool):
        return f"{name} = {value!r} is neither true nor false", "write true or false"
    if setting.kind == "choice" and value not in setting.choices:
        return f"there is no {name} = {value!r}", f"the choices are {', '.join(setting.choices)}"
    if setting.kind == "betas" and not _are_betas(value):
        return f"betas = {value!r} is not two numbers in [0, 1)", "write betas: [0.9, 0.95]"
    return None


def _are_betas(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return all(isinstance(beta, (int, float)) and not isinstance(beta, bool) and 0 <= beta < 1 for beta in value)
