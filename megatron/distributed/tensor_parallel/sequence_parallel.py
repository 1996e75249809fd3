"""Megatron sequence parallelism (arXiv:2205.05198, section 4.2): between tensor-parallel regions each rank holds its
part of the sequence only.

What tensor parallelism does by an all-reduce is done by its two halves: a tensor-parallel region is entered by an
all-gather along the sequence, whose gradient is a reduce-scatter, and left by a reduce-scatter, whose gradient is an
all-gather. The amount of communication is the same; norms, dropout and the residual stream take 1/t of the memory.

Shapes: s sequence (the first dimension), t tensor-parallel degree; other dimensions are free.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.collectives import LOW_PRECISION, copy_to, paired, reduce_from
from megatron.distributed.mesh import Axis
from megatron.kernels.linear import LinearKernel, pieces_of


def all_gather_first(x: Tensor, axis: Axis) -> Tensor:
    """Join every rank's ``x`` along the first dimension, without a gradient: [s/t, ...] -> [s, ...]."""
    whole = x.new_empty(x.shape[0] * axis.size, *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=axis.group)
    return whole


def reduce_scatter_first(x: Tensor, axis: Axis) -> Tensor:
    """This rank's part of the sum of every rank's ``x``, without a gradient: [s, ...] -> [s/t, ...].

    ValueError where the first dimension does not divide by the number of ranks.
    """
    if x.shape[0] % axis.size:
        raise ValueError(f"a sequence of {x.shape[0]} does not divide by {axis.size} tensor-parallel ranks")
    wide = x.float() if axis.fp32_reduce and x.dtype in LOW_PRECISION else x
    part = wide.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    dist.reduce_scatter_tensor(part, wide.contiguous(), group=axis.group)
    return part.to(x.dtype)


def enter(x: Tensor, axis: Axis) -> Tensor:
    """Enter a tensor-parallel region with the whole ``x`` [s, ...], whose gradient the ranks each give a term of.

    Where the axis cuts the sequence ``x`` is this rank's part of it, [s/t, ...].
    """
    return paired(x, axis, all_gather_first, reduce_scatter_first) if axis.sequence else copy_to(x, axis)


def leave(x: Tensor, axis: Axis) -> Tensor:
    """Leave a tensor-parallel region with the sum of the ranks' ``x`` [s, ...].

    Where the axis cuts the sequence each rank keeps its part of it, [s/t, ...].
    """
    return paired(x, axis, reduce_scatter_first, all_gather_first) if axis.sequence else reduce_from(x, axis)


def gathered_linear(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, kernel: LinearKernel) -> Tensor:
    """The product of the whole sequence with this rank's weight: [s/t, ..., in] -> [s, ..., out].

    Only the part x is kept for the backward pass, which gathers the sequence once more; with a frozen weight nothing.
    """
    out: Tensor = _GatheredLinear.apply(x, weight, bias, axis, kernel)
    return out


def with_copy(x: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Enter a tensor-parallel region and stay outside of it as well: the whole ``x`` twice, [s, ...].

    The first is for what every rank computes alike from the whole sequence; its gradient is the same on all of them.
    The second is for the region, whose ranks each give a term of the gradient. Where the axis cuts the sequence ``x``
    is this rank's part of it, [s/t, ...].
    """
    if not axis.sequence:
        return x, copy_to(x, axis)
    outside, inside = _GatherTwice.apply(x, axis)
    return outside, inside


def own_part(x: Tensor, axis: Axis) -> Tensor:
    """What every rank computed alike for the whole sequence, as the residual stream has it: [s, ...] -> this rank's
    part of it where the axis cuts the sequence, [s/t, ...].
    """
    if not axis.sequence:
        return x
    part: Tensor = _OwnPart.apply(x, axis)
    return part


class _OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.chunk(axis.size)[axis.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_first(grads[0], ctx.axis), None


class _GatherTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
        ctx.axis = axis
        whole = all_gather_first(x, axis)
        return whole, whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        axis = ctx.axis
        return grads[0].chunk(axis.size)[axis.rank] + reduce_scatter_first(grads[1], axis), None


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, kernel: LinearKernel) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.has_bias, ctx.axis, ctx.pieces = bias is not None, axis, pieces_of(kernel)
        product: Tensor = ctx.pieces.product(all_gather_first(x, axis), weight, bias)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _, _ = ctx.needs_input_grad
        rows = grads[0].reshape(-1, weight.shape[0])  # [rows, out]
        grad_x = grad_weight = grad_bias = None
        if need_x:
            whole = ctx.pieces.product(rows, weight.t(), None)
            grad_x = reduce_scatter_first(whole.view(*grads[0].shape[:-1], weight.shape[1]), ctx.axis)
        if need_weight:
            gathered = all_gather_first(x, ctx.axis)
            grad_weight = ctx.pieces.weight_gradient(rows, gathered.view(-1, weight.shape[1]))
        if ctx.has_bias and need_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, None
