"""Tokens in the order of their experts, and back: rows are gathered, and weighted rows are summed, without a scatter.

The plain implementation is in `megatron/kernels/permute.py`. An assignment (token t, slot j of its k experts) has the
index t * k + j; `order` lists the assignments of the rows, and `inverse` the row of each one, -1 if it is dropped.

Shapes: n tokens, k experts of a token, m rows, h hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.permute import Permutation
from megatron.kernels.triton import runtime

_BLOCK = 1024


@triton.jit
def gather_rows(x, order, weights, y, columns, slots, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):
    """One program a block of columns of a row: y[i] = x[order[i] // k] [* weights[order[i]]]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    assignment = tl.load(order + row).to(tl.int64)
    value = tl.load(x + assignment // slots * columns + column, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        value = value * tl.load(weights + assignment).to(tl.float32)
    tl.store(y + row * columns + column, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def sum_rows(rows, inverse, weights, y, columns, slots, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):
    """One program a block of columns of a token: y[t] = sum over j of rows[inverse[t, j]] [* weights[t, j]]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(slots):
        row = tl.load(inverse + token * slots + slot).to(tl.int64)
        value = tl.load(rows + row * columns + column, mask=inside & (row >= 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            value = value * tl.load(weights + token * slots + slot).to(tl.float32)
        total += value
    tl.store(y + token * columns + column, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def row_products(rows, inverse, dy, out, columns, slots, BLOCK: tl.constexpr):
    """One program an assignment: out[t, j] = rows[inverse[t, j]] . dy[t], 0 where it is dropped."""
    assignment = tl.program_id(0).to(tl.int64)
    row = tl.load(inverse + assignment).to(tl.int64)
    token = assignment // slots
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + column < columns
        first = tl.load(rows + row * columns + start + column, mask=inside & (row >= 0), other=0.0).to(tl.float32)
        second = tl.load(dy + token * columns + start + column, mask=inside, other=0.0).to(tl.float32)
        total += first * second
    tl.store(out + assignment, tl.sum(total, axis=0).to(out.dtype.element_ty))


def inverse_of(order: Tensor, assignments: int) -> Tensor:
    """The row of each assignment, -1 if it is dropped: order [m] -> [n k]."""
    inverse = order.new_full((assignments,), -1)
    return inverse.index_copy_(0, order, torch.arange(len(order), dtype=order.dtype, device=order.device))


def _gather(x: Tensor, order: Tensor, weights: Tensor | None, slots: int) -> Tensor:
    y = x.new_empty(len(order), x.shape[1])
    block = min(_BLOCK, runtime.next_power_of_2(x.shape[1]))
    grid = (len(order), runtime.cdiv(x.shape[1], block))
    given = x if weights is None else weights
    runtime.launch(gather_rows, grid, x, order, given, y, x.shape[1], slots, BLOCK=block, WEIGHTED=weights is not None)
    return y


def _sum(rows: Tensor, inverse: Tensor, weights: Tensor | None, slots: int) -> Tensor:
    y = rows.new_empty(len(inverse) // slots, rows.shape[1])
    block = min(_BLOCK, runtime.next_power_of_2(rows.shape[1]))
    grid = (len(y), runtime.cdiv(rows.shape[1], block))
    given = rows if weights is None else weights
    runtime.launch(
        sum_rows, grid, rows, inverse, given, y, rows.shape[1], slots, BLOCK=block, WEIGHTED=weights is not None
    )
    return y


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.slots = len(inverse) // max(1, len(tokens))
        return _gather(tokens.contiguous(), order, None, ctx.slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _sum(grads[0].contiguous(), inverse, None, ctx.slots), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        rows, weights = rows.contiguous(), weights.contiguous()
        ctx.save_for_backward(rows, weights, order, inverse)
        return _sum(rows, inverse, weights, weights.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, order, inverse = ctx.saved_tensors
        dy, slots = grads[0].contiguous(), weights.shape[1]
        dweights = torch.empty_like(weights)
        block = min(_BLOCK, runtime.next_power_of_2(rows.shape[1]))
        runtime.launch(row_products, (len(inverse),), rows, inverse, dy, dweights, rows.shape[1], slots, BLOCK=block)
        return _gather(dy, order, weights, slots), dweights, None, None


def permute(tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """The token of each assignment in order: tokens [n, h] -> [m, h].

    order: assignment of each row, int64 [m]. inverse: row of each assignment, -1 if it is dropped, [n k].
    """
    rows: Tensor = _Permute.apply(tokens, order, inverse)
    return rows


def combine(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """The weighted sum of each token's rows: rows [m, h] -> [n, h].

    Args:
        rows: Outputs of the experts [m, h].
        weights: Weights of the experts of each token [n, k].
        order: Assignment of each row, int64 [m].
        inverse: Row of each assignment, -1 if it is dropped, [n k].
    """
    y: Tensor = _Combine.apply(rows, weights, order, inverse)
    return y


def _gather_tokens(tokens: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    return permute(tokens, order, inverse)


PERMUTATION = Permutation(inverse_of, _gather_tokens, combine)
"""What the table of kernels names."""
