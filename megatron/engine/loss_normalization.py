"""One mean for every layout: a step's loss is the mean over all unmasked tokens of its global batch.

Micro batches and ranks hold different numbers of unmasked tokens, so a mean of their means would weigh a token by the
company it keeps, and change with the layout. The tokens of the whole step are counted first instead, and every micro
batch divides the sum of its losses by the same number.

s sequence, b micro batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.mesh import Topology


def loss_divisor(batches: Sequence[MicroBatch], topology: Topology, device: torch.device | str) -> Tensor:
    """What each micro batch's sum of losses is divided by [tokens]: the step's unmasked tokens over its shares.

    DeepSpeed averages losses and gradients over the micro batches of a step and over the ranks that it takes for
    data-parallel, context-parallel ones included. Each of those is a share, and the mean of sum / (tokens / shares) is
    the sum over all of them / tokens. batches: all micro batches of this rank's step. Collective over the data axis.
    """
    tokens = sum_over_data(unmasked(batches).to(device), topology)
    return tokens.clamp(min=1) / (len(batches) * topology.dp_cp.size)


def unmasked(batches: Sequence[MicroBatch]) -> Tensor:
    """How many tokens of these micro batches count, a float64 scalar: whole numbers stay exact up to 2^53."""
    return torch.stack([batch.loss_mask.sum(dtype=torch.float64) for batch in batches]).sum()


def sum_over_data(value: Tensor, topology: Topology) -> Tensor:
    """The sum over the data axis, in place, of what ranks that share their samples count once."""
    if topology.data.size > 1:
        dist.all_reduce(value, group=topology.data.group)
    return value
