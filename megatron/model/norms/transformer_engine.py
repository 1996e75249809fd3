"""Norms of NVIDIA's Transformer Engine, for GPUs; the same functions as layernorm and rmsnorm."""

from __future__ import annotations

import torch
import transformer_engine.pytorch as te
from torch import Tensor, nn

from megatron.distributed.param_attrs import mark_no_weight_decay


class TELayerNorm(nn.Module):
    """Layer normalization by Transformer Engine. It always has a bias; see layernorm.py."""

    def __init__(self, hidden_size: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        inner = te.LayerNorm(hidden_size, eps=epsilon, device=torch.get_default_device())
        self.weight, self.bias = inner.weight, inner.bias
        self._inner = (inner,)  # in a tuple, so that the parameters are registered once
        for parameter in self.parameters():
            mark_no_weight_decay(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return self._inner[0](x)


class TERMSNorm(nn.Module):
    """Root mean square normalization by Transformer Engine; see rmsnorm.py."""

    def __init__(self, hidden_size: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        inner = te.RMSNorm(hidden_size, eps=epsilon, device=torch.get_default_device())
        self.weight = inner.weight
        self._inner = (inner,)
        mark_no_weight_decay(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return self._inner[0](x)
