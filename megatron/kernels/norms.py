"""Normalization over the last dimension. Shapes: h hidden; leading dimensions are free."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """X / sqrt(mean(x²) + epsilon) * scale of [..., h], by torch's operator."""
    return F.rms_norm(x, scale.shape, scale, epsilon)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias of [..., h], by torch's operator.

    Args:
        x: Input [..., h].
        weight: Scale [h], or None.
        bias: Shift [h], or None.
        epsilon: Added to the variance.
    """
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


def plain_rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """Reference implementation, with the mean in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * scale.float()).to(x.dtype)
