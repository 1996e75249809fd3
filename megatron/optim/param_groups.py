"""Parameters sorted into optimizer groups by the marks they carry and by the rate at which they learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Parameter

from megatron.distributed.mesh import Axis, expert_group_name
from megatron.distributed.param_attrs import expert_axis, no_weight_decay
from megatron.errors import RunError

RATE = "rate"
"""What a group's learning rate is multiplied by, under this name in the group; 1 where it has none."""


def parameter_groups(
    parameters: Iterable[Parameter], weight_decay: float, rates: Mapping[Parameter, float] | None = None
) -> list[dict[str, Any]]:
    """A group for every rate, with and without weight decay; an empty one is left out.

    Norms and biases carry the no-decay mark; with a weight decay of 0 the two need not be told apart. rates:
    factors of the learning rate, 1 where there is none. Decay is divided by the factor, so that weights fade as fast as
    without it (the package `mup` does the same).
    """
    sorted_: dict[tuple[bool, float], list[Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            exempt = weight_decay == 0.0 or no_weight_decay(parameter)
            sorted_.setdefault((exempt, (rates or {}).get(parameter, 1.0)), []).append(parameter)
    groups = [
        {
            "params": some,
            "weight_decay": 0.0 if exempt else weight_decay / rate,
            "name": _name(exempt, rate),
            RATE: rate,
        }
        for (exempt, rate), some in sorted(sorted_.items(), key=lambda item: item[0])
    ]
    return [part for group in groups for part in _by_experts(group)]


def set_learning_rate(groups: list[dict[str, Any]], rate: float) -> None:
    """The rate of the coming step, in every group times its own factor."""
    for group in groups:
        group["lr"] = rate * group.get(RATE, 1.0)


def balance_group_count(groups: list[dict[str, Any]], axis: Axis, device: torch.device) -> list[dict[str, Any]]:
    """The groups, some of them in two, so that all ranks of the axis have as many; collective.

    DeepSpeed's ZeRO sums the norm of each group over pipeline stages, and a stage without an embedding, say, would
    have a group less than the others and leave them waiting. RunError where a stage has too few parameters for that.
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
        number = max(range(len(found)), key=lambda place: len(found[place]["params"]))
        group = found[number]
        middle = len(group["params"]) // 2
        halves = [{**group, "params": part} for part in (group["params"][:middle], group["params"][middle:])]
        found[number : number + 1] = halves
    return found


def _name(exempt: bool, rate: float) -> str:
    return ("plain" if exempt else "decayed") + ("" if rate == 1.0 else f" at {rate:g}")


def _by_experts(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group as DeepSpeed wants it: experts that are spread over ranks stand apart, under the name of their ranks."""
    parts: dict[str | None, list[Parameter]] = {}
    for parameter in group["params"]:
        axis = expert_axis(parameter)
        spread = axis is not None and axis.size > 1
        parts.setdefault(expert_group_name(axis.size) if axis and spread else None, []).append(parameter)
    return [
        {**group, "params": some} if name is None else {**group, "params": some, "name": name, "moe": True}
        for name, some in parts.items()
    ]
