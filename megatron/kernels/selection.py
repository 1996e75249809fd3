"""The kernels of one model, chosen once when it is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron.kernels.attention import AttentionKernel, choose_attention, plain_attention
from megatron.kernels.grouped import GroupedKernel, choose_grouped, plain_grouped
from megatron.kernels.linear import LinearKernel, choose_linear, plain_linear
from megatron.kernels.rotary import RotaryKernel, plain_rotary, rotary


@dataclass(frozen=True)
class Kernels:
    """What each part of the model calls."""

    linear: LinearKernel
    attention: AttentionKernel
    rotary: RotaryKernel
    grouped: GroupedKernel = plain_grouped


def choose_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest available kernels for parameters of this type on this device."""
    return Kernels(
        linear=choose_linear(device, dtype),
        attention=choose_attention(device),
        rotary=rotary,
        grouped=choose_grouped(device, dtype),
    )


def plain_kernels() -> Kernels:
    """The plain twins: slower, and the reference for the others."""
    return Kernels(linear=plain_linear, attention=plain_attention, rotary=plain_rotary)
