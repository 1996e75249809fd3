"""Root mean square normalization (arXiv:1910.07467). Shapes: h hidden; leading dimensions are free."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.distributed.param_attrs import mark_no_weight_decay
from megatron.kernels.norms import RMS_NORM


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + epsilon) * scale, over the last dimension. It ignores ``bias``."""

    takes_residual = True

    def __init__(self, hidden_size: int, epsilon: float, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.compute = RMS_NORM
        self.scale = nn.Parameter(torch.ones(hidden_size))
        mark_no_weight_decay(self.scale)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., h] -> [..., h]; with a residual the norm of residual + x, and that sum."""
        if residual is not None:
            return self.compute.of_sum(x, residual, self.scale, self.epsilon)
        return self.compute(x, self.scale, self.epsilon)
