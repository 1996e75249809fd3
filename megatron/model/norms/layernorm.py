"""Layer normalization (arXiv:1607.06450). Shapes: h hidden; leading dimensions are free."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.distributed.param_attrs import mark_no_weight_decay
from megatron.kernels.norms import LAYER_NORM


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, over the last dimension."""

    takes_residual = True

    def __init__(self, hidden_size: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.compute = LAYER_NORM
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        for parameter in self.parameters():
            mark_no_weight_decay(parameter)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., h] -> [..., h]; with a residual the norm of residual + x, and that sum."""
        if residual is not None:
            return self.compute.of_sum(x, residual, self.weight, self.bias, self.epsilon)
        return self.compute(x, self.weight, self.bias, self.epsilon)
