"""Parameter groups by weight decay, learning-rate scale and expert parallelism."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter

from megatron.distributed.mesh import Axis, expert_group_name
from megatron.distributed.param_attrs import expert_axis, no_weight_decay
from megatron.errors import RunError

LR_SCALE = "rate"
"""Key of a group's learning-rate multiplier; 1 if absent."""


def parameter_groups(
    parameters: Iterable[Parameter], weight_decay: float, lr_scales: Mapping[Parameter, float] | None = None
) -> list[dict[str, Any]]:
    """Returns a group for each learning-rate scale, with and without weight decay; empty ones are left out.

    Norms and biases are excluded from weight decay; with a weight decay of 0 no distinction is made. Decay is divided
    by the learning-rate scale, so that the effective decay is unchanged (as in the package `mup`). lr_scales:
    multipliers of the learning rate, 1 if absent.
    """
    sorted_: dict[tuple[bool, float], list[Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            exempt = weight_decay == 0.0 or no_weight_decay(parameter)
            sorted_.setdefault((exempt, (lr_scales or {}).get(parameter, 1.0)), []).append(parameter)
    groups = [
        {
            "params": some,
            "weight_decay": 0.0 if exempt else weight_decay / lr_scale,
            "name": _name(exempt, lr_scale),
            LR_SCALE: lr_scale,
        }
        for (exempt, lr_scale), some in sorted(sorted_.items(), key=lambda item: item[0])
    ]
    return [part for group in groups for part in _by_experts(group)]


def set_learning_rate(groups: list[dict[str, Any]], lr_scale: float) -> None:
    """Sets the learning rate of the coming step, times the multiplier of each group."""
    for group in groups:
        group["lr"] = lr_scale * group.get(LR_SCALE, 1.0)


def balance_group_count(groups: list[dict[str, Any]], axis: Axis, device: torch.device) -> list[dict[str, Any]]:
    """Splits groups so that all ranks of the axis have the same number; collective.

    DeepSpeed's ZeRO sums the norm of each group over pipeline stages; a stage with fewer groups, such as one without an
    embedding, would leave the others waiting. Raises RunError if a stage has too few parameters.
    """
    if axis.size == 1:
        return groups
    most = torch.tensor(len(groups), device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=axis.group)
    if sum(len(group["params"]) for group in groups) < int(most):
        raise RunError.of(
            f"this pipeline stage has fewer parameters than there are groups of them ({int(most)})",
            hint="give it more layers with pipe_partition_method, or use zero_optimization: {stage: 0}",
        )
    found = list(groups)
    while len(found) < int(most):
        number = max(range(len(found)), key=lambda index: len(found[index]["params"]))
        group = found[number]
        middle = len(group["params"]) // 2
        halves = [{**group, "params": part} for part in (group["params"][:middle], group["params"][middle:])]
        found[number : number + 1] = halves
    return found


def _name(exempt: bool, lr_scale: float) -> str:
    return ("plain" if exempt else "decayed") + ("" if lr_scale == 1.0 else f" at {lr_scale:g}")


def _by_experts(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Splits a group as DeepSpeed expects: experts that are distributed over ranks, under the name of their group."""
    parts: dict[str | None, list[Parameter]] = {}
    for parameter in group["params"]:
        axis = expert_axis(parameter)
        spread = axis is not None and axis.size > 1
        parts.setdefault(expert_group_name(axis.size) if axis and spread else None, []).append(parameter)
    return [
        {**group, "params": some} if name is None else {**group, "params": some, "name": name, "moe": True}
        for name, some in parts.items()
    ]
