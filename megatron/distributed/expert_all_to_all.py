"""Rows that travel to the ranks that hold their experts, and back (arXiv:2006.16668, section 3).

Each rank of the axis sends a part of its rows to every other; how many, only the rows decide. The gradient of one
journey is the journey back.

Shapes: m rows, h their width, p ranks of the axis.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.collectives import paired
from megatron.distributed.mesh import Axis


def exchange_counts(counts: Tensor, axis: Axis) -> Tensor:
    """What the others have for this rank: [p, e], row i for rank i -> [p, e], row i from rank i."""
    if axis.size == 1:
        return counts
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=axis.group)
    return received


def exchange_rows(rows: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    """Rows [m, h], those for rank 0 first -> the rows that came, those from rank 0 first.

    sent, received: rows for and from each rank.
    """
    return paired(
        rows,
        axis,
        partial(_exchange, sent=sent, received=received),
        partial(_exchange, sent=received, received=sent),
    )


def _exchange(rows: Tensor, axis: Axis, *, sent: list[int], received: list[int]) -> Tensor:
    came = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(came, rows.contiguous(), received, sent, group=axis.group)
    return came
