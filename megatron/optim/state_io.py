"""What an optimizer keeps of a tensor, in the form in which checkpoints store it.

Three kinds: values with an element for each of the tensor's own, which can be cut like the tensor; values for the
tensor as a whole (the row and column statistics of SM3 and Adafactor); and the number of updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.optim.builder_args import STEP, step_count

MOMENT, LARGEST_MOMENT = "exp_avg_sq", "max_exp_avg_sq"


@dataclass(frozen=True)
class Kept:
    """step [updates]. elementwise: as the tensor's shape. whole: of any other shape."""

    step: int = 0
    elementwise: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)


def kept(optimizer: torch.optim.Optimizer, owner: Tensor, *, apart: tuple[str, ...] = ()) -> Kept:
    """The state of one tensor that the optimizer steps; views. apart: names that somebody else stores."""
    state: Mapping[str, Any] = optimizer.state.get(owner, {})
    if not state:
        return Kept()
    step = int(state.get(STEP, 0))
    codec = getattr(optimizer, "neox_codec", None)
    if codec is not None:
        return Kept(step, codec.unpack(state))
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in (STEP, *apart)}
    own = {name: value for name, value in tensors.items() if value.shape == owner.shape}
    return Kept(step, own, {name: value for name, value in tensors.items() if name not in own})


def restore(optimizer: torch.optim.Optimizer, owner: Tensor, found: Kept) -> None:
    """Makes `found` the state of one tensor."""
    codec = getattr(optimizer, "neox_codec", None)
    if codec is not None:
        codec.pack(optimizer, owner, found.elementwise, found.step)
        return
    state = optimizer.state[owner]
    state.update(found.elementwise)
    state.update(found.whole)
    state[STEP] = step_count(optimizer, found.step, owner.device)
    wants_largest = any(group.get("amsgrad") for group in optimizer.param_groups)
    if wants_largest and LARGEST_MOMENT not in state and MOMENT in state:
        state[LARGEST_MOMENT] = state[MOMENT].clone()
    elif not wants_largest:
        state.pop(LARGEST_MOMENT, None)
