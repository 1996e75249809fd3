"""Norms whose factor is 1 + weight, with initial weights of 0. Shapes: h hidden; leading dimensions are free.

The factor is formed in fp32: in bfloat16 the sum would lose all but the first digits of a small weight. As in
transformers the result is rounded to the type of the input once, after the product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.distributed.param_attrs import mark_no_weight_decay
from megatron.kernels.norms import LAYER_NORM, RMS_NORM


def _wide(x: Tensor) -> Tensor:
    """Converts to at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm1P(nn.Module):
    """x / sqrt(mean(x²) + epsilon) * (1 + scale), over the last dimension. It ignores ``bias``."""

    takes_residual = True

    def __init__(self, hidden_size: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.compute = RMS_NORM
        self.scale = nn.Parameter(torch.zeros(hidden_size))
        mark_no_weight_decay(self.scale)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., h] -> [..., h]; with a residual the norm of residual + x, and that sum."""
        factor = 1.0 + _wide(self.scale)
        if residual is not None and factor.dtype == x.dtype:
            return self.compute.of_sum(x, residual, factor, self.epsilon)
        total = x if residual is None else residual + x
        normed = self.compute(_wide(total), factor, self.epsilon).to(x.dtype)
        return normed if residual is None else (normed, total)


class LayerNorm1P(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * (1 + weight) + bias, over the last dimension."""

    def __init__(self, hidden_size: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.compute = LAYER_NORM
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        for parameter in self.parameters():
            mark_no_weight_decay(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        bias = None if self.bias is None else _wide(self.bias)
        return self.compute(_wide(x), 1.0 + _wide(self.weight), bias, self.epsilon).to(x.dtype)
