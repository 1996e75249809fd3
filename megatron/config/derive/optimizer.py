"""The optimizer block and the keys that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron.errors import ConfigError, Mistake
from megatron.registry import nearest_name

DEFAULT_LR = 1.0e-3

ADAM_PARAMS = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "bias_correction",
    "adam_w_mode",
    "amsgrad",
    "max_grad_norm",
    "torch_adam",
    "freeze_step",
    "cuda_aware",
    "comm_backend_name",
)
"""What the params of any Adam may name; gradient_clipping decides where max_grad_norm is given."""


@dataclass(frozen=True)
class OptimizerChoice:
    """block: {type, params}. kind: its type in lower case. lr: the peak. weight_decay: None where not in params."""

    block: dict[str, Any]
    kind: str
    lr: float
    weight_decay: float | None


def derive_optimizer(
    block: dict[str, Any] | None, kind: str | None, lr: float | None, choices: tuple[str, ...]
) -> OptimizerChoice:
    """Reads the optimizer block, or makes one from `optimizer_type` and `lr`.

    kind and lr: what the user gave for those keys, None where nothing. Raises ConfigError for an unknown type, wrong
    parameters or a contradiction.
    """
    if block is None:
        block = {"type": kind or "adam", "params": {"lr": DEFAULT_LR if lr is None else lr}}
    ConfigError.raise_any(_form_mistakes(block))
    found_kind, params = str(block["type"]).lower(), block["params"]
    found_lr = params.get("lr", DEFAULT_LR if lr is None else lr)
    mistakes = [
        *_kind_mistakes(block["type"], choices),
        *(_contradiction("optimizer_type", kind, found_kind, block) if found_kind in choices else ()),
        *_contradiction("lr", lr, found_lr, block),
        *_number_mistakes(block),
        *(_unknown_params(params, block) if "adam" in found_kind else ()),
    ]
    ConfigError.raise_any(mistakes)
    decay = params.get("weight_decay")
    return OptimizerChoice(block, found_kind, float(found_lr), None if decay is None else float(decay))


def _form_mistakes(block: dict[str, Any]) -> list[Mistake]:
    remedy = "write {type: Adam, params: {lr: 6.0e-4}}"
    faults = ["the block names no type"] if not isinstance(block.get("type"), str) else []
    faults += ["the block has no params"] if not isinstance(block.get("params"), dict) else []
    return [Mistake(what, key="optimizer", value=block, remedy=remedy) for what in faults]


def _kind_mistakes(kind: str, choices: tuple[str, ...]) -> list[Mistake]:
    if kind.lower() in choices:
        return []
    close = "adam, whose weight decay is decoupled" if kind.lower() == "adamw" else nearest_name(kind, choices)
    listed = f"the choices are {', '.join(choices)}"
    remedy = f"did you mean {close}? Otherwise {listed}" if close else listed
    return [Mistake("there is no optimizer of this type", key="optimizer", value=kind, remedy=remedy)]


def _contradiction(key: str, given: object, found: object, block: dict[str, Any]) -> list[Mistake]:
    if given is None or given == found:
        return []
    return [Mistake(f"optimizer says {found!r}: {block!r}", key=key, value=given, remedy="leave one of the two out")]


def _unknown_params(params: dict[str, Any], block: dict[str, Any]) -> list[Mistake]:
    mistakes = []
    for name in params:
        if name not in ADAM_PARAMS:
            close = nearest_name(str(name), ADAM_PARAMS)
            remedy = f"did you mean {close}?" if close else f"the parameters are {', '.join(ADAM_PARAMS)}"
            mistakes.append(Mistake(f"Adam has no parameter {name}", key="optimizer", value=block, remedy=remedy))
    return mistakes


def _number_mistakes(block: dict[str, Any]) -> list[Mistake]:
    mistakes, params = [], block["params"]
    for name in ("lr", "weight_decay", "eps", "momentum"):
        value = params.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            told = f"{name} = {value!r} is not a finite number"
            mistakes.append(Mistake(told, key="optimizer", value=block, remedy="write it as 0.001 or 1.0e-8"))
    betas = params.get("betas", (0.9, 0.999))
    if (
        not isinstance(betas, (list, tuple))
        or len(betas) != 2
        or not all(isinstance(beta, (int, float)) and not isinstance(beta, bool) and 0 <= beta < 1 for beta in betas)
    ):
        told = f"betas = {betas!r} is not two numbers in [0, 1)"
        mistakes.append(Mistake(told, key="optimizer", value=block, remedy="write betas: [0.9, 0.95]"))
    return mistakes
