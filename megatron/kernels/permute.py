"""Tokens in the order of their experts, and the weighted sum of what the experts make of them.

An assignment (token t, slot j of its k experts) has the index t * k + j.

Shapes: n tokens, k experts of a token, m assignments that are not dropped, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Permutation:
    """Kernels of the way to the experts and back."""

    prepare: Callable[[Tensor, int], Tensor]
    """(order of assignments [m], n * k) -> what the others need of it."""
    gather: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    """(tokens [n, h], order, prepared, k) -> the token of each assignment in order [m, h]."""
    combine: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(rows [m, h], weights [n, k], order, prepared) -> the weighted sum of each token's rows [n, h]."""


def _prepare(order: Tensor, assignments: int) -> Tensor:
    return order


def _gather(tokens: Tensor, order: Tensor, prepared: Tensor, top_k: int) -> Tensor:
    return tokens.index_select(0, order // top_k)


class _Scatter(torch.autograd.Function):
    """Rows [m, h] at their indices of [n k, h], zeros elsewhere; torch's index_copy would save the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, assignments: int) -> Tensor:
        ctx.save_for_backward(order)
        return rows.new_zeros(assignments, rows.shape[1]).index_copy_(0, order, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order), None, None


def _combine(rows: Tensor, weights: Tensor, order: Tensor, prepared: Tensor) -> Tensor:
    outputs: Tensor = _Scatter.apply(rows, order, weights.numel())
    return (outputs.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


PERMUTATION = Permutation(_prepare, _gather, _combine)
"""By operators of torch."""
