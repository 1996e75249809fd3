"""DeepSpeed Ulysses (arXiv:2309.14509): all-to-all between sequence shards and heads.

Outside the attention core a rank has a shard of the sequence and all heads. Before the core an all-to-all gives it the
full sequence of some heads, and after the core another one restores the sequence shard. Each is the gradient of the
other.

Shapes: b micro batch, n heads, s sequence of one rank, d head dim, c context-parallel degree.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.collectives import with_grad
from megatron.distributed.mesh import Axis


def all_to_all_seq_to_heads(x: Tensor, axis: Axis) -> Tensor:
    """Sequence shard, all heads -> full sequence, this rank's heads: [b, n, s, d] -> [b, n/c, c s, d]."""
    return with_grad(x, axis, _seq_to_heads, _heads_to_seq)


def all_to_all_heads_to_seq(x: Tensor, axis: Axis) -> Tensor:
    """Full sequence, this rank's heads -> sequence shard, all heads: [b, n/c, c s, d] -> [b, n, s, d]."""
    return with_grad(x, axis, _heads_to_seq, _seq_to_heads)


def _all_to_all(x: Tensor, axis: Axis, split_dim: int, cat_dim: int) -> Tensor:
    """Sends a chunk of one dimension to each rank, and concatenates the received chunks along another."""
    sent = torch.stack(x.chunk(axis.size, dim=split_dim))  # [c, ...]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=axis.group)
    return torch.cat(received.unbind(0), dim=cat_dim)


def _seq_to_heads(x: Tensor, axis: Axis) -> Tensor:
    return _all_to_all(x, axis, split_dim=1, cat_dim=2)  # [b, n/c, c s, d]


def _heads_to_seq(x: Tensor, axis: Axis) -> Tensor:
    return _all_to_all(x, axis, split_dim=2, cat_dim=1)  # [b, n, s, d]
