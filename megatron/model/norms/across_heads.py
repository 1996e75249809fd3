"""One root mean square norm over the features of all heads of queries or of keys (OLMo 2, arXiv:2501.00656).

Tensor-parallel ranks have heads each; the sum of the squares is one over all of them, and so is its gradient.

Shapes: b micro batch, n heads, s sequence, d head dim, t tensor-parallel degree.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.distributed.collectives import all_reduced, with_grad
from megatron.distributed.mesh import Axis
from megatron.distributed.param_attrs import mark_no_weight_decay, mark_sharded


class AcrossHeadsNorm(nn.Module):
    """x / sqrt(mean(x²) + epsilon) * scale, the mean over heads and features; parameter ``scale`` [n d / t].

    Args:
        heads: Heads of all ranks, n.
        head_dim: Features of a head, d.
        epsilon: Added to the mean.
        axis: Tensor-parallel ranks.
        one_plus: The factor is 1 + scale.
    """

    def __init__(self, heads: int, head_dim: int, epsilon: float, *, axis: Axis, one_plus: bool = False) -> None:
        super().__init__()
        self.axis, self.epsilon, self.features = axis, epsilon, heads * head_dim
        self.heads, self.one_plus = heads // axis.size, one_plus
        shape = (self.heads * head_dim,)
        self.scale = nn.Parameter(torch.zeros(shape) if one_plus else torch.ones(shape))
        mark_no_weight_decay(self.scale)
        if axis.size > 1:
            mark_sharded(self.scale, 0)

    def forward(self, x: Tensor) -> Tensor:
        """[b, n/t, s, d] -> the same."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum((1, 3), keepdim=True)  # [b, 1, s, 1]
        mean = with_grad(squares, self.axis, all_reduced, all_reduced) / self.features
        scale = self.scale.to(wide.dtype).view(self.heads, 1, -1)  # [n/t, 1, d]
        factor = 1.0 + scale if self.one_plus else scale
        return (wide * torch.rsqrt(mean + self.epsilon) * factor).to(x.dtype)
