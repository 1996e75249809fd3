"""Parameters sorted into optimizer groups by the marks they carry."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn import Parameter

from megatron.parallel.marks import expert_axis, no_weight_decay
from megatron.parallel.topology import expert_group_name


def parameter_groups(parameters: Iterable[Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay; an empty one is left out.

    Norms and biases carry the no-decay mark; with a weight decay of 0 the two need not be told apart.
    """
    decayed: list[Parameter] = []
    plain: list[Parameter] = []
    for parameter in parameters:
        if parameter.requires_grad:
            exempt = weight_decay == 0.0 or no_weight_decay(parameter)
            (plain if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": plain, "weight_decay": 0.0, "name": "plain"},
    ]
    return [part for group in groups if group["params"] for part in _by_experts(group)]


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
