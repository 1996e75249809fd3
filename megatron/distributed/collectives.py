"""Communication between tensor-parallel ranks, each operation beside its gradient.

The pairs follow Megatron-LM (arXiv:1909.08053, section 3): ``copy_to`` is its f (identity forward, all-reduce
backward) and ``reduce_from`` its g (all-reduce forward, identity backward). ``gather_from`` and ``scatter_to`` are the
pair along the last dimension. With one rank each of them returns its input.

Shapes: any leading dimensions; t tensor-parallel degree; the last dimension is the one that is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.mesh import Axis

LOW_PRECISION = (torch.float16, torch.bfloat16)
"""Types whose sums over ranks `fp32_reduce` widens."""


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce ``x`` in place over the axis, without a gradient. Returns ``x``."""
    if axis.size == 1:
        return x
    if axis.fp32_reduce and x.dtype in LOW_PRECISION:
        wide = x.float()
        dist.all_reduce(wide, op=op, group=axis.group)
        return x.copy_(wide)
    dist.all_reduce(x, op=op, group=axis.group)
    return x


def all_gather_last(x: Tensor, axis: Axis) -> Tensor:
    """Join every rank's ``x`` along the last dimension, without a gradient."""
    if axis.size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts, dim=-1)


def local_slice(x: Tensor, axis: Axis) -> Tensor:
    """This rank's slice of the last dimension, as a copy that owns its memory."""
    if axis.size == 1:
        return x
    return x.chunk(axis.size, dim=-1)[axis.rank].contiguous()


def summed(x: Tensor, axis: Axis) -> Tensor:
    """The sum of every rank's ``x``, without a gradient; ``x`` stays as it is."""
    return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)


def unchanged(x: Tensor, axis: Axis) -> Tensor:
    """``x`` itself."""
    return x.view_as(x)


Move = Callable[[Tensor, Axis], Tensor]
"""Something that ranks of an axis do with their tensors, without a gradient."""


class _Paired(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, there: Move, back: Move) -> Tensor:
        ctx.axis, ctx.back = axis, back
        return there(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grads[0], ctx.axis), None, None, None


def paired(x: Tensor, axis: Axis, there: Move, back: Move) -> Tensor:
    """``there(x, axis)``, whose gradient goes through ``back``; with one rank ``x``."""
    if axis.size == 1:
        return x
    out: Tensor = _Paired.apply(x, axis, there, back)
    return out


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Enter a tensor-parallel region: the same ``x`` on all ranks, its gradient summed over them."""
    return paired(x, axis, unchanged, summed)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Leave a tensor-parallel region: the sum of the ranks' ``x`` on all of them, the gradient unchanged."""
    return paired(x, axis, summed, unchanged)


def gather_from(x: Tensor, axis: Axis) -> Tensor:
    """Join slices of the last dimension: [..., n/t] -> [..., n]; the gradient is this rank's slice."""
    return paired(x, axis, all_gather_last, local_slice)


def scatter_to(x: Tensor, axis: Axis) -> Tensor:
    """Keep this rank's slice of the last dimension: [..., n] -> [..., n/t]; the gradient is gathered."""
    return paired(x, axis, local_slice, all_gather_last)
