"""The matrices of which a weight consists, where Muon orthogonalizes each apart.

They are queries, keys and values, their heads, or the experts of a stack.

Shapes: p matrices of one size, r their rows, c their columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.distributed.param_attrs import HeadLayout, expert_count, head_layout


@dataclass(frozen=True)
class Pieces:
    """How a weight is cut into matrices."""

    sizes: tuple[tuple[int, int], ...]
    """(p, r) of each batch of matrices, in the order of their rows."""
    order: Tensor | None = None
    """Row of the weight at each row of the batches; None where they are in order."""

    def split(self, weight: Tensor) -> list[Tensor]:
        """[rows, c] -> matrices [p, r, c], a tensor for each size."""
        ordered = weight if self.order is None else weight[self.order]
        parts = ordered.split([count * rows for count, rows in self.sizes])
        return [part.view(*size, -1) for part, size in zip(parts, self.sizes, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Matrices [p, r, c] -> [rows, c]: the inverse of `split`."""
        ordered = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        if self.order is None:
            return ordered
        joined = torch.empty_like(ordered)
        joined[self.order] = ordered
        return joined


def pieces_of(parameter: Parameter, *, experts: bool, qkv: bool, heads: bool) -> Pieces:
    """Returns the matrices of a full weight.

    Args:
        parameter: The weight, in full.
        experts: True if those of a stack are matrices of their own.
        qkv: True if queries, keys and values are.
        heads: True if every head of queries, keys and values is.
    """
    layout, (rows, _) = head_layout(parameter), parameter.shape
    if layout is not None and qkv:
        return _by_heads(layout) if heads else _by_role(layout, parameter.device)
    count = expert_count(parameter) if experts else 1
    return Pieces(((count, rows // count),))


def _by_role(layout: HeadLayout, device: torch.device) -> Pieces:
    """Returns all queries, all keys and all values as a matrix each."""
    queries, keys = layout.queries * layout.head_dim, layout.keys * layout.head_dim
    if layout.grouped:
        return Pieces(((1, queries), (2, keys)))
    order = torch.arange(3 * queries, device=device).view(layout.queries, 3, layout.head_dim)
    return Pieces(((3, queries),), order.transpose(0, 1).reshape(-1))


def _by_heads(layout: HeadLayout) -> Pieces:
    """Returns every head of queries, keys and values as a matrix; heads are whole in both orders of the rows."""
    return Pieces(((layout.queries + 2 * layout.keys, layout.head_dim),))
