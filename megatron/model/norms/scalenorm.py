"""Scale norm (arXiv:1910.05895, section 2.2): vectors of one learned length. Shapes: h features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.distributed.param_attrs import mark_no_weight_decay


class ScaleNorm(nn.Module):
    """g * x / max(|x|, epsilon) over the last dimension; g is a scalar. It ignores ``bias``."""

    def __init__(self, hidden_size: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.g = nn.Parameter(torch.ones(1))
        mark_no_weight_decay(self.g)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]; the length is computed in fp32."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        return x * (self.g / length.clamp(min=self.epsilon)).to(x.dtype)
