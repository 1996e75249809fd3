"""Key and value heads that several tensor-parallel ranks share, where there are more ranks than such heads.

Each of the ranks computes a part of the head's features, with its own rows of the weight, and gathers the head. All of
them attend to it with query heads of their own, so its gradient is summed over them, and each takes its part of the
sum. That equals copies of the head's weight with summed gradients, without the copies: no weight is on two ranks.

Shapes: any leading dimensions; d head dim, r ranks that share a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.distributed.collectives import all_gather_last, with_grad
from megatron.distributed.mesh import Axis
from megatron.distributed.tensor_parallel.sequence_parallel import reduce_scatter_first


def gather_head(part: Tensor, axis: Axis) -> Tensor:
    """Gathers a head of which each rank has a part, [..., d/r] -> [..., d]; the gradient is summed and scattered."""
    return with_grad(part, axis, all_gather_last, _reduce_scatter_last)


def _reduce_scatter_last(x: Tensor, axis: Axis) -> Tensor:
    """Returns this rank's part of the sum over the ranks, without a gradient: [..., d] -> [..., d/r]."""
    return reduce_scatter_first(torch.stack(x.chunk(axis.size, dim=-1)), axis).squeeze(0)
