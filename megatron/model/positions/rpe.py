"""Relative positions of T5 (arXiv:1910.10683, section 2.1): a learned bias a head for each bucket of distance.

All blocks share one table, `attention.rpe.weight` of block 0. As in the public checkpoints it is multiplied by sqrt(d)
before it is added to scores that have been divided by sqrt(d), so it weighs as much as in T5, which divides nothing.

Shapes: n heads, d head dim, t tensor-parallel degree.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from megatron.distributed.param_attrs import mark_embedding_like, mark_tied
from megatron.distributed.param_init import ParamFactory
from megatron.model.init import xavier_normal
from megatron.model.positions.base import Positions
from megatron.param_table import Multipliers


def buckets(length: int, count: int, max_distance: int, device: torch.device) -> Tensor:
    """Returns the bucket of each distance 0 .. length - 1: half for one distance each, then logarithmic ones.

    The last bucket holds every distance from max_distance on.

    Args:
        length: Number of distances.
        count: Number of buckets.
        max_distance: Distance from which on all are in the last bucket.
        device: Device of the result.
    """
    exact = count // 2
    distance = torch.arange(length, device=device)
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (count - exact)
    far = (exact + growth.long()).clamp(max=count - 1)
    return torch.where(distance < exact, distance, far)


class RelativePositions(Positions, nn.Module):
    """Relative position bias by bucket of distance, parameter ``weight`` [buckets, n/t].

    Args:
        count: Number of buckets.
        max_distance: Distance from which on all are in the last bucket.
        heads: Attention heads of this rank.
        scale: Factor of the bias.
        source: Creates the parameter.
    """

    def __init__(self, count: int, max_distance: int, heads: int, scale: float, source: ParamFactory) -> None:
        super().__init__()
        self.count, self.max_distance, self.scale = count, max_distance, scale
        init_fn = xavier_normal(std=1.0, num_layers=1, hidden_size=1)  # unused by this initialization
        self.weight = source.sharded("weight", (count, heads), init_fn, dim=1)
        mark_embedding_like(self.weight)
        mark_tied(self.weight)

    @classmethod
    def for_scores(cls, model: Any, source: ParamFactory, multipliers: Multipliers) -> nn.Module:
        """Builds it from the model section's rpe_num_buckets and rpe_max_distance."""
        heads, head_dim = model.num_attention_heads, model.kv_channels or model.hidden_size // model.num_attention_heads
        scale = math.sqrt(head_dim) * multipliers.relative * multipliers.scores
        return cls(model.rpe_num_buckets, model.rpe_max_distance, heads, scale, source)

    def forward(self, length: int, device: torch.device) -> Tensor:
        """Returns the bias at distances 0 .. length - 1, fp32 [n/t, length]."""
        bucket = buckets(length, self.count, self.max_distance, device)
        return self.weight.float()[bucket].t() * self.scale
