"""Optimizers with 8-bit state from the package bitsandbytes (arXiv:2110.02861).

State is quantized in blocks of 256 elements of the tensor that the optimizer steps, so block boundaries depend on the
layout. A checkpoint therefore holds the state in fp32, which any layout can shard and the 32-bit optimizer can read;
quantizing it again in the same blocks gives the same codes, and scales that differ by rounding alone. Tensors of less
than 4,096 elements keep 32 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bitsandbytes
import torch
from torch import Tensor

from megatron.optim.adam import BETAS, EPS
from megatron.optim.builder_args import STEP, Groups, OptimizerArgs, mark_int_step

BLOCK = 256  # [elements]


def build_adam(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds AdamW with two 8-bit moments."""
    optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=args.lr, betas=args.betas(BETAS), eps=args.number("eps", EPS))
    return _with_codec(optimizer, "exp_avg", "exp_avg_sq")


def build_lion(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds Lion with an 8-bit momentum."""
    optimizer = bitsandbytes.optim.Lion8bit(groups, lr=args.lr, betas=args.betas((0.9, 0.99)))
    return _with_codec(optimizer, "exp_avg")


def build_sgd(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds SGD with an 8-bit momentum."""
    optimizer = bitsandbytes.optim.SGD8bit(
        groups, lr=args.lr, momentum=args.number("momentum", 0.9), nesterov=args.flag("nesterov", False)
    )
    return _with_codec(optimizer, "momentum_buffer")


def _with_codec(optimizer: torch.optim.Optimizer, *names: str) -> torch.optim.Optimizer:
    optimizer.neox_codec = Codec(names)  # type: ignore[attr-defined]
    return mark_int_step(optimizer)


class Codec:
    """Converts quantized state to fp32 and back."""

    def __init__(self, names: tuple[str, ...]) -> None:
        """Creates the codec. names: names of the optimizer's state1 and state2 in checkpoints."""
        self._names = names

    def unpack(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the state of one tensor in fp32, by name."""
        found = {}
        for number, name in enumerate(self._names, start=1):
            stored = state[f"state{number}"]
            if stored.dtype == torch.uint8:
                stored = numbers(stored, state[f"absmax{number}"], state[f"qmap{number}"])
            found[name] = stored
        return found

    def pack(self, optimizer: Any, owner: Tensor, tensors: Mapping[str, Tensor], step: int) -> None:
        """Quantizes stored state into the state of one tensor.

        Args:
            optimizer: optimizer of bitsandbytes.
            owner: tensor that it steps.
            tensors: stored state in fp32, by name.
            step: number of updates.
        """
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
    """Dequantizes codes to fp32 values of the same shape.

    Args:
        stored: codes.
        scales: scale of each block.
        table: value of each code, ascending.
    """
    flat = table[stored.flatten().int()]
    return (flat * scales.repeat_interleave(BLOCK)[: flat.numel()]).view(stored.shape)


def codes(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes values: returns (nearest codes in the values' shape, scale of each block), the inverse of `numbers`."""
    count = values.numel()
    blocks = torch.nn.functional.pad(values.flatten(), (0, -count % BLOCK)).view(-1, BLOCK)
    scales = blocks.amax(1) / table[-1]
    if table[0] < 0:  # its smallest value is closer to zero than its largest
        scales = torch.maximum(scales, blocks.amin(1) / table[0])
    middles = (table[1:] + table[:-1]) / 2
    nearest = torch.bucketize(blocks / scales.clamp(min=1e-38).unsqueeze(1), middles)
    return nearest.to(torch.uint8).flatten()[:count].view(values.shape), scales
