"""Layer normalization (arXiv:1607.06450). Shapes: h hidden; leading dimensions are free."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.distributed.param_attrs import mark_no_weight_decay
from megatron.kernels.norms import layer_norm


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, over the last dimension."""

    def __init__(self, hidden_size: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.compute = layer_norm
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        for parameter in self.parameters():
            mark_no_weight_decay(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return self.compute(x, self.weight, self.bias, self.epsilon)
