"""Optimizers whose state has eight bits an element, from the package bitsandbytes (arXiv:2110.02861).

State is quantised in blocks of 256 elements of whatever tensor the optimizer steps, so blocks end elsewhere in another
layout. A checkpoint therefore holds the state as numbers, which any layout can cut and the 32-bit optimizer can read;
quantising them again in the same blocks gives back the same codes, and scales that differ by rounding alone. Tensors
of less than 4,096 elements keep 32 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bitsandbytes
import torch
from torch import Tensor

from megatron.optim.adam import BETAS, EPS
from megatron.optim.builder_args import STEP, Groups, Request, count_in_integers

BLOCK = 256  # [elements]


def build_adam(groups: Groups, request: Request) -> torch.optim.Optimizer:
    """AdamW with two 8-bit moments."""
    optimizer = bitsandbytes.optim.AdamW8bit(
        groups, lr=request.lr, betas=request.betas(BETAS), eps=request.number("eps", EPS)
    )
    return _with_codec(optimizer, "exp_avg", "exp_avg_sq")


def build_lion(groups: Groups, request: Request) -> torch.optim.Optimizer:
    """Lion with an 8-bit momentum."""
    optimizer = bitsandbytes.optim.Lion8bit(groups, lr=request.lr, betas=request.betas((0.9, 0.99)))
    return _with_codec(optimizer, "exp_avg")


def build_sgd(groups: Groups, request: Request) -> torch.optim.Optimizer:
    """Descent with an 8-bit momentum."""
    optimizer = bitsandbytes.optim.SGD8bit(
        groups, lr=request.lr, momentum=request.number("momentum", 0.9), nesterov=request.flag("nesterov", False)
    )
    return _with_codec(optimizer, "momentum_buffer")


def _with_codec(optimizer: torch.optim.Optimizer, *names: str) -> torch.optim.Optimizer:
    optimizer.neox_codec = Codec(names)  # type: ignore[attr-defined]
    return count_in_integers(optimizer)


class Codec:
    """State as numbers and back. names: what the optimizer's state1 and state2 are called elsewhere."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def unpack(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state of one tensor in fp32, by name."""
        found = {}
        for number, name in enumerate(self._names, start=1):
            stored = state[f"state{number}"]
            if stored.dtype == torch.uint8:
                stored = numbers(stored, state[f"absmax{number}"], state[f"qmap{number}"])
            found[name] = stored
        return found

    def pack(self, optimizer: Any, owner: Tensor, tensors: Mapping[str, Tensor], step: int) -> None:
        """Puts numbers into the state of one tensor."""
        optimizer.init_state(optimizer.param_groups[0], owner, 0, 0)
        state = optimizer.state[owner]
        for number, name in enumerate(self._names, start=1):
            values, stored = tensors[name], state[f"state{number}"]
            if stored.dtype == torch.uint8:
                values, scales = codes(values, state[f"qmap{number}"])
                state[f"absmax{number}"].copy_(scales)
            stored.copy_(values.view_as(stored))
        state[STEP] = step


def numbers(stored: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """Codes as fp32 numbers of the same shape. scales: one a block. table: the number of each code, rising."""
    flat = table[stored.flatten().int()]
    return (flat * scales.repeat_interleave(BLOCK)[: flat.numel()]).view(stored.shape)


def codes(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(nearest codes of the values' shape, scale of each block): what `numbers` turned into these values."""
    count = values.numel()
    blocks = torch.nn.functional.pad(values.flatten(), (0, -count % BLOCK)).view(-1, BLOCK)
    scales = blocks.amax(1) / table[-1]
    if table[0] < 0:  # its least number is nearer to zero than its greatest
        scales = torch.maximum(scales, blocks.amin(1) / table[0])
    middles = (table[1:] + table[:-1]) / 2
    nearest = torch.bucketize(blocks / scales.clamp(min=1e-38).unsqueeze(1), middles)
    return nearest.to(torch.uint8).flatten()[:count].view(values.shape), scales
