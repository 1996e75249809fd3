"""Layer normalization (arXiv:1607.06450). Shapes: h hidden; leading dimensions are free."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.param_attrs import mark_no_weight_decay


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, over the last dimension."""

    def __init__(self, hidden_size: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.shape = (hidden_size,)
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None
        for parameter in self.parameters():
            mark_no_weight_decay(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.epsilon)
