"""Normalization over the last dimension. Shapes: h hidden; leading dimensions are free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.cpp_norms import cpp_norm_unavailable, cpp_rms_norm, cpp_rms_norm_of_sum


@dataclass(frozen=True)
class NormKernel:
    """A norm, alone and with the residual sum in front; both take x and the parameters of the norm's function."""

    alone: Callable[..., Tensor]
    """(x [..., h], parameters) -> the norm of x."""
    fused_sum: Callable[..., tuple[Tensor, Tensor]] | None = None
    """(x, residual, parameters) -> the norm of residual + x, and the sum; None for two operations."""

    def __call__(self, x: Tensor, *parameters: Any) -> Tensor:
        """[..., h] -> [..., h]."""
        return self.alone(x, *parameters)

    def of_sum(self, x: Tensor, residual: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
        """The norm of residual + x, and the sum, rounded to its type; all [..., h]."""
        if self.fused_sum is not None:
            return self.fused_sum(x, residual, *parameters)
        total = residual + x
        return self.alone(total, *parameters), total


def rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """X / sqrt(mean(x²) + epsilon) * scale of [..., h], by torch's operator; on a CPU by a compiled loop."""
    if cpp_norm_unavailable(x, scale) is None:
        return cpp_rms_norm(x, scale, epsilon)
    return F.rms_norm(x, scale.shape, scale, epsilon)


def rms_norm_of_sum(x: Tensor, residual: Tensor, scale: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm of residual + x, and the sum; all [..., h].

    Args:
        x: A term of the residual stream.
        residual: The stream.
        scale: [h].
        epsilon: Added to the mean of the squares.
    """
    if x.dtype == residual.dtype and cpp_norm_unavailable(x, scale) is None:
        return cpp_rms_norm_of_sum(x, residual, scale, epsilon)
    total = residual + x
    return rms_norm(total, scale, epsilon), total


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


RMS_NORM = NormKernel(rms_norm, rms_norm_of_sum)
LAYER_NORM = NormKernel(layer_norm)
