"""Parameters sorted into optimizer groups by the marks they carry."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn import Parameter

from megatron.parallel.marks import no_weight_decay


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
    return [group for group in groups if group["params"]]
