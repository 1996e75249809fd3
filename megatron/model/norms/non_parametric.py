"""Layer normalization without weight and bias, as in OLMo (arXiv:2402.00838). Shapes: h features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class NonParametricLayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon), over the last dimension. It ignores ``bias``."""

    def __init__(self, hidden_size: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.shape = (hidden_size,)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return F.layer_norm(x, self.shape, None, None, self.epsilon)
