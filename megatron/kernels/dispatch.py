"""Selects the kernels of a model, once, when it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.kernels.attention import AttentionKernel, choose_attention, sdpa_attention
from megatron.kernels.flash_attention import choose_flash
from megatron.kernels.grouped_matmul import GroupedKernel, choose_grouped, plain_grouped
from megatron.kernels.linear import LinearKernel, choose_linear, plain_linear
from megatron.kernels.mamba import MambaKernels, choose_mamba
from megatron.kernels.rotary import RotaryKernel, rotary


@dataclass(frozen=True)
class Kernels:
    """The kernels of a model."""

    linear: LinearKernel
    """Matrix product of linear layers."""
    attention: AttentionKernel
    """Attention of blocks of kind `global`."""
    flash: AttentionKernel
    """Attention of blocks of kind `flash`."""
    rotary: RotaryKernel
    """Rotary positions."""
    grouped: GroupedKernel = plain_grouped
    """Matrix products of experts."""
    mamba: MambaKernels = field(
        default_factory=lambda: choose_mamba(torch.device("cpu"), convolution=False, scan=False)
    )
    """Convolution and scan of Mamba blocks."""

    def recomputed(self, recompute: Callable[..., Tensor]) -> Kernels:
        """Returns kernels whose attention core is recomputed in the backward pass: recompute(core, *inputs)."""
        return replace(self, attention=partial(recompute, self.attention), flash=partial(recompute, self.flash))


def choose_kernels(device: torch.device, dtype: torch.dtype, section: Any = None) -> Kernels:
    """Returns the fastest available kernels for parameters of this type on this device.

    section: the configuration's kernels section, which enables some of them.
    """
    fused = getattr(section, "mamba_inner_func_fusion", False)
    compiled = getattr(section, "compile", False)  # torch.compile fuses torch's own kernels only
    return Kernels(
        linear=plain_linear if compiled else choose_linear(device, dtype),
        attention=sdpa_attention if compiled and device.type == "cpu" else choose_attention(device),
        flash=choose_flash(device, dtype),
        rotary=rotary,
        grouped=choose_grouped(device, dtype),
        mamba=choose_mamba(
            device,
            convolution=fused or getattr(section, "mamba_causal_conv_fusion", False),
            scan=fused or getattr(section, "mamba_selective_scan_fusion", False),
        ),
    )
