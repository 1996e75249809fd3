"""Loss normalization: a step's loss is the mean over all unmasked tokens of its global batch, in every layout.

Micro batches and ranks hold different numbers of unmasked tokens, so a mean of their means would weight tokens by how
many are unmasked in their micro batch, and change with the layout. So the tokens of the full step are counted first,
and every micro batch divides the sum of its losses by the same number.

s sequence, b micro batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.mesh import Topology


def loss_divisor(
    batches: Sequence[MicroBatch], topology: Topology, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Returns the divisor of each micro batch's sum of losses [tokens], and whether there is any token to learn.

    Collective over the data axis.

    DeepSpeed averages losses and gradients over the micro batches of a step and over data-parallel ranks, which include
    context-parallel ones. With n such terms the mean of sum / (tokens / n) is the sum over all of them / tokens.
    batches: all micro batches of this rank's step.
    """
    tokens = sum_over_data(count_loss_tokens(batches).to(device), topology)
    return tokens.clamp(min=1) / (len(batches) * topology.dp_cp.size), tokens > 0


def count_loss_tokens(batches: Sequence[MicroBatch]) -> Tensor:
    """Returns the number of unmasked tokens as a float64 scalar, which is exact up to 2^53."""
    return torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()


def sum_over_data(value: Tensor, topology: Topology) -> Tensor:
    """Sums in place over the data axis a value that ranks with the same samples count once."""
    if topology.data.size > 1:
        dist.all_reduce(value, group=topology.data.group)
    return value
