"""Optimizer state of a tensor, in the form in which checkpoints store it.

There are three kinds: elementwise values, which can be sharded like the tensor; tensor-level values (the row and column
statistics of SM3 and Adafactor); and the number of updates.
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
class TensorState:
    """State of one tensor."""

    step: int = 0
    """Number of updates."""
    elementwise: dict[str, Tensor] = field(default_factory=dict)
    """Values in the tensor's shape, by name."""
    tensor_level: dict[str, Tensor] = field(default_factory=dict)
    """Values of any other shape, by name."""


def read_state(optimizer: torch.optim.Optimizer, owner: Tensor, *, exclude: tuple[str, ...] = ()) -> TensorState:
    """Returns the state of one tensor of the optimizer, as views. exclude: names that are stored elsewhere."""
    state: Mapping[str, Any] = optimizer.state.get(owner, {})
    if not state:
        return TensorState()
    step = int(state.get(STEP, 0))
    codec = getattr(optimizer, "neox_codec", None)
    if codec is not None:
        return TensorState(step, codec.unpack(state))
    tensors = {
        name: value
        for name, value in _without_lists(state).items()
        if isinstance(value, Tensor) and name not in (STEP, *exclude)
    }
    own = {name: value for name, value in tensors.items() if value.shape == owner.shape}
    return TensorState(step, own, {name: value for name, value in tensors.items() if name not in own})


def write_state(optimizer: torch.optim.Optimizer, owner: Tensor, found: TensorState) -> None:
    """Sets the state of one tensor of the optimizer."""
    codec = getattr(optimizer, "neox_codec", None)
    if codec is not None:
        codec.pack(optimizer, owner, found.elementwise, found.step)
        return
    state = optimizer.state[owner]
    state.update(_with_lists({**found.elementwise, **found.tensor_level}))
    state[STEP] = step_count(optimizer, found.step, owner.device)
    wants_largest = any(group.get("amsgrad") for group in optimizer.param_groups)
    if wants_largest and LARGEST_MOMENT not in state and MOMENT in state:
        state[LARGEST_MOMENT] = state[MOMENT].clone()
    elif not wants_largest:
        state.pop(LARGEST_MOMENT, None)


def _without_lists(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns state with each tensor of a list under a name of its own: the list's, a dot and its index."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        items = {f"{name}.{index}": item for index, item in enumerate(value)} if isinstance(value, list) else {}
        found |= items or {name: value}
    return found


def _with_lists(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns state as an optimizer has it: the inverse of `_without_lists`; [] is where a list had no tensor."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        base, dot, index = name.rpartition(".")
        if not dot or not index.isdigit():
            found[name] = value
            continue
        items = found.setdefault(base, [])
        items.extend([] for _ in range(int(index) + 1 - len(items)))
        items[int(index)] = value
    return found
