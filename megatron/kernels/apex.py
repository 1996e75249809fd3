"""Norms of NVIDIA Apex, for machines that have it and no Triton. Shapes: h hidden; leading dimensions are free."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.norms import NormKernel


def rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """X / sqrt(mean(x²) + epsilon) * scale of [..., h]."""
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    y: Tensor = fused_rms_norm_affine(x, scale, scale.shape, epsilon)
    return y


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias of [..., h].

    Args:
        x: Input [..., h].
        weight: Scale [h], or None.
        bias: Shift [h], or None.
        epsilon: Added to the variance.
    """
    from apex.normalization.fused_layer_norm import fused_layer_norm, fused_layer_norm_affine

    if weight is None:
        without: Tensor = fused_layer_norm(x, x.shape[-1:], epsilon)
        return without
    shift = torch.zeros_like(weight) if bias is None else bias
    y: Tensor = fused_layer_norm_affine(x, weight, shift, weight.shape, epsilon)
    return y


RMS_NORM = NormKernel(rms_norm)
LAYER_NORM = NormKernel(layer_norm)
