"""DeepSpeed Ulysses (arXiv:2309.14509): ranks that share a sequence exchange parts of it for heads.

Everywhere but in the attention core a rank works on its part of the sequence with all heads. Before the core an
all-to-all gives it the whole sequence of some heads, and after it another one gives the parts back. Each is the
gradient of the other.

Shapes: b micro batch, n heads, s sequence of one rank, d head dim, c context-parallel degree.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.collectives import paired
from megatron.distributed.mesh import Axis


def all_to_all_seq_to_heads(x: Tensor, axis: Axis) -> Tensor:
    """Part of the sequence, all heads -> the whole sequence, this rank's heads: [b, n, s, d] -> [b, n/c, c s, d]."""
    return paired(x, axis, _parts_to_heads, _heads_to_parts)


def all_to_all_heads_to_seq(x: Tensor, axis: Axis) -> Tensor:
    """The way back, from the whole sequence of this rank's heads: [b, n/c, c s, d] -> [b, n, s, d]."""
    return paired(x, axis, _heads_to_parts, _parts_to_heads)


def _exchange(x: Tensor, axis: Axis, cut: int, join: int) -> Tensor:
    """Cuts a dimension into a part for each rank, and joins the parts that come along another."""
    sent = torch.stack(x.chunk(axis.size, dim=cut))  # [c, ...]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=axis.group)
    return torch.cat(received.unbind(0), dim=join)


def _parts_to_heads(x: Tensor, axis: Axis) -> Tensor:
    return _exchange(x, axis, cut=1, join=2)  # [b, n/c, c s, d]


def _heads_to_parts(x: Tensor, axis: Axis) -> Tensor:
    return _exchange(x, axis, cut=2, join=1)  # [b, n, s, d]


def shard_sequence(x: Tensor, axis: Axis) -> Tensor:
    """This rank's part of whole sequences: [b, s] -> [b, s/c]. ValueError where c does not divide s."""
    if axis.size == 1:
        return x
    if x.shape[1] % axis.size:
        raise ValueError(f"a sequence of {x.shape[1]} does not divide by {axis.size} context-parallel ranks")
    return x.chunk(axis.size, dim=1)[axis.rank].contiguous()
