"""All-to-all of tokens to the ranks that hold their experts, and back (arXiv:2006.16668, section 3).

Each rank of the axis sends a variable number of its rows to each other rank. The backward of an all-to-all is the
reverse all-to-all.

Shapes: m rows, h their width, p ranks of the axis.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.collectives import with_grad
from megatron.distributed.mesh import Axis


def all_to_all_counts(counts: Tensor, axis: Axis) -> Tensor:
    """Exchanges counts: [p, e], row i for rank i -> [p, e], row i from rank i."""
    if axis.size == 1:
        return counts
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=axis.group)
    return received


def all_to_all_rows(rows: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    """Exchanges rows: [m, h] ordered by receiving rank -> rows ordered by sending rank.

    Args:
        rows: rows of this rank.
        sent: number of rows for each rank.
        received: number of rows from each rank.
        axis: ranks that communicate.
    """
    return with_grad(
        rows,
        axis,
        partial(_all_to_all, sent=sent, received=received),
        partial(_all_to_all, sent=received, received=sent),
    )


def _all_to_all(rows: Tensor, axis: Axis, *, sent: list[int], received: list[int]) -> Tensor:
    came = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(came, rows.contiguous(), received, sent, group=axis.group)
    return came
