"""Tensor-parallel collectives, each with its gradient.

The pairs follow Megatron-LM (arXiv:1909.08053, section 3): ``copy_to`` is its f (identity forward, all-reduce
backward) and ``reduce_from`` its g (all-reduce forward, identity backward). ``gather_from`` and ``scatter_to`` are the
pair along the last dimension. On an axis of one rank each of them returns its input.

Shapes: any leading dimensions; t tensor-parallel degree; the last dimension is the sharded one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.mesh import Axis

LOW_PRECISION = (torch.float16, torch.bfloat16)
"""Types that `fp32_reduce` widens to fp32 for sums over ranks."""


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduces ``x`` in place over the axis, without a gradient. Returns ``x``."""
    if axis.size == 1:
        return x
    if axis.fp32_reduce and x.dtype in LOW_PRECISION:
        wide = x.float()
        dist.all_reduce(wide, op=op, group=axis.group)
        return x.copy_(wide)
    dist.all_reduce(x, op=op, group=axis.group)
    return x


def all_gather_last(x: Tensor, axis: Axis) -> Tensor:
    """Gathers ``x`` of all ranks along the last dimension, without a gradient."""
    if axis.size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, dim=-1)


def local_slice(x: Tensor, axis: Axis) -> Tensor:
    """Returns this rank's slice of the last dimension, as a copy that owns its memory."""
    if axis.size == 1:
        return x
    return x.chunk(axis.size, dim=-1)[axis.rank].contiguous()


def all_reduced(x: Tensor, axis: Axis) -> Tensor:
    """Returns the sum of ``x`` over the ranks, without a gradient; ``x`` is not changed."""
    return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)


def identity(x: Tensor, axis: Axis) -> Tensor:
    """Returns ``x``."""
    return x.view_as(x)


Collective = Callable[[Tensor, Axis], Tensor]
"""A collective over an axis, without a gradient."""


class _WithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, forward_op: Collective, backward_op: Collective) -> Tensor:
        ctx.axis, ctx.backward_op = axis, backward_op
        return forward_op(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.backward_op(grads[0], ctx.axis), None, None, None


def with_grad(x: Tensor, axis: Axis, forward_op: Collective, backward_op: Collective) -> Tensor:
    """Returns ``forward_op(x, axis)``, with ``backward_op`` as its gradient. On one rank returns ``x``.

    Args:
        x: input tensor.
        axis: ranks that communicate.
        forward_op: collective of the forward pass.
        backward_op: collective of the gradient.
    """
    if axis.size == 1:
        return x
    out: Tensor = _WithGrad.apply(x, axis, forward_op, backward_op)
    return out


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Enters a tensor-parallel region: identity forward, all-reduce of the gradient."""
    return with_grad(x, axis, identity, all_reduced)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Leaves a tensor-parallel region: all-reduce forward, identity for the gradient."""
    return with_grad(x, axis, all_reduced, identity)


def gather_from(x: Tensor, axis: Axis) -> Tensor:
    """Gathers slices of the last dimension: [..., n/t] -> [..., n]; the gradient is this rank's slice."""
    return with_grad(x, axis, all_gather_last, local_slice)


def scatter_to(x: Tensor, axis: Axis) -> Tensor:
    """Returns this rank's slice of the last dimension: [..., n] -> [..., n/t]; the gradient is gathered."""
    return with_grad(x, axis, local_slice, all_gather_last)
