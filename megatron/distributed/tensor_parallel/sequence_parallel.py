"""Megatron sequence parallelism (arXiv:2205.05198, section 4.2).

Between tensor-parallel regions each rank has a shard of the sequence. The all-reduces of tensor parallelism are split
into halves: a tensor-parallel region is entered by an all-gather along the sequence, whose gradient is a
reduce-scatter, and left by a reduce-scatter, whose gradient is an all-gather. The amount of communication is the same;
norms, dropout and the residual stream take 1/t of the memory.

The weight gradient of a column-parallel layer needs its full input again. `Regather` fetches it together with the
gradient of the sum behind the row-parallel layer that follows, in one all-gather.

Shapes: s sequence (the first dimension), t tensor-parallel degree; other dimensions are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.collectives import LOW_PRECISION, copy_to, reduce_from, with_grad
from megatron.distributed.mesh import Axis
from megatron.kernels.linear import LinearKernel, linear_ops


def all_gather_first(x: Tensor, axis: Axis) -> Tensor:
    """Gathers ``x`` of all ranks along the first dimension, without a gradient: [s/t, ...] -> [s, ...]."""
    full = x.new_empty(x.shape[0] * axis.size, *x.shape[1:])
    dist.all_gather_into_tensor(full, x.contiguous(), group=axis.group)
    return full


def reduce_scatter_first(x: Tensor, axis: Axis) -> Tensor:
    """Returns this rank's shard of the sum of ``x`` over the ranks, without a gradient: [s, ...] -> [s/t, ...].

    Raises ValueError if the first dimension does not divide by the number of ranks.
    """
    if x.shape[0] % axis.size:
        raise ValueError(f"a sequence of {x.shape[0]} does not divide by {axis.size} tensor-parallel ranks")
    wide = x.float() if axis.fp32_reduce and x.dtype in LOW_PRECISION else x
    part = wide.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    dist.reduce_scatter_tensor(part, wide.contiguous(), group=axis.group)
    return part.to(x.dtype)


def gather_or_copy_to_tp(x: Tensor, axis: Axis) -> Tensor:
    """Enters a tensor-parallel region with the full ``x`` [s, ...]; the gradient is summed over the ranks.

    With sequence parallelism ``x`` is this rank's shard, [s/t, ...].
    """
    return with_grad(x, axis, all_gather_first, reduce_scatter_first) if axis.sequence_parallel else copy_to(x, axis)


class Regather:
    """The inputs of a region's column-parallel layers, which the backward pass of its end gathers for all of them.

    One object belongs to one forward pass of a region.
    """

    def __init__(self) -> None:
        self.shards: list[Tensor] = []
        self.full: list[Tensor] = []
        self._users: list[int] = []

    @staticmethod
    def of(axis: Axis) -> Regather | None:
        """Returns one for a region with sequence parallelism and a backward pass, else None."""
        if not axis.sequence_parallel or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return Regather()

    def number(self, shard: Tensor) -> int:
        """Returns the number of an input, [s/t, ...]; layers may share one."""
        for number, known in enumerate(self.shards):
            if known is shard:
                self._users[number] += 1
                return number
        self.shards.append(shard)
        self._users.append(1)
        return len(self.shards) - 1

    def take(self, number: int, shard: Tensor, axis: Axis) -> Tensor:
        """Returns a full input, [s, ...], and forgets it with the last layer that takes it; gathers it if necessary.

        Args:
            number: of the input.
            shard: this rank's shard of it.
            axis: tensor-parallel ranks.
        """
        if not self.full:
            return all_gather_first(shard, axis)
        found = self.full[number]
        self._users[number] -= 1
        if self._users[number] == 0:
            self.full[number] = found.new_empty(0)
        return found


def reduce_from_tp(x: Tensor, axis: Axis, regather: Regather | None = None) -> Tensor:
    """Leaves a tensor-parallel region with the sum of ``x`` over the ranks [s, ...].

    With sequence parallelism each rank gets its shard of it, [s/t, ...].

    Args:
        x: this rank's term.
        axis: tensor-parallel ranks.
        regather: inputs of the region that the backward pass gathers together with the gradient.
    """
    if not axis.sequence_parallel:
        return reduce_from(x, axis)
    if regather is None or not regather.shards:
        return with_grad(x, axis, reduce_scatter_first, all_gather_first)
    shards, regather.shards = regather.shards, []
    out: Tensor = _ReduceAndRegather.apply(x, axis, regather, *shards)
    return out


def all_gather_together(parts: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """Gathers tensors of one type along the first dimension together, without a gradient: [s/t, ...] -> [s, ...]."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    ranks = all_gather_first(flat, axis).view(axis.size, -1)
    columns = ranks.split([part.numel() for part in parts], dim=1)
    return [
        column.reshape(axis.size * part.shape[0], *part.shape[1:]) for column, part in zip(columns, parts, strict=True)
    ]


def gathered_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axis: Axis,
    kernel: LinearKernel,
    regather: Regather | None = None,
) -> Tensor:
    """Multiplies the full sequence with this rank's weight: [s/t, ..., in] -> [s, ..., out].

    Only the shard x is saved for the backward pass, which gathers the sequence again; with a frozen weight nothing is
    saved.

    Args:
        x: this rank's shard of the sequence.
        weight: this rank's shard of the weight.
        bias: this rank's shard of the bias.
        axis: tensor-parallel ranks.
        kernel: matrix product.
        regather: Gathers the sequence again at the end of the region.
    """
    out: Tensor = _GatheredLinear.apply(x, weight, bias, axis, kernel, regather)
    return out


def gather_twice(x: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Returns the full ``x`` [s, ...] twice: once outside and once inside a tensor-parallel region.

    The first is for what every rank computes alike from the full sequence; its gradient is the same on all of them. The
    second is for the region, in which each rank contributes a term of the gradient. With sequence parallelism ``x`` is
    this rank's shard, [s/t, ...].
    """
    if not axis.sequence_parallel:
        return x, copy_to(x, axis)
    outside, inside = _GatherTwice.apply(x, axis)
    return outside, inside


def scatter_to_sequence_parallel(x: Tensor, axis: Axis) -> Tensor:
    """Returns what every rank computed alike in the layout of the residual stream: [s, ...] -> [s, ...].

    With sequence parallelism that is this rank's shard of it, [s/t, ...].
    """
    if not axis.sequence_parallel:
        return x
    part: Tensor = _ScatterToSequenceParallel.apply(x, axis)
    return part


class _ScatterToSequenceParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.chunk(axis.size)[axis.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_first(grads[0], ctx.axis), None


class _ReduceAndRegather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, regather: Regather, *shards: Tensor) -> Tensor:
        ctx.save_for_backward(*shards)
        ctx.axis, ctx.regather = axis, regather
        return reduce_scatter_first(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shards = ctx.saved_tensors  # read once: recomputation gives each tensor out once
        gradient, *ctx.regather.full = all_gather_together([grads[0], *shards], ctx.axis)
        return gradient, None, None, *(None for _ in shards)


class _GatherTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
        ctx.axis = axis
        full = all_gather_first(x, axis)
        return full, full.view_as(full)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        axis = ctx.axis
        return grads[0].chunk(axis.size)[axis.rank] + reduce_scatter_first(grads[1], axis), None


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        axis: Axis,
        kernel: LinearKernel,
        regather: Regather | None,
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.has_bias, ctx.axis, ctx.chunks = bias is not None, axis, linear_ops(kernel)
        together = ctx.needs_input_grad[1] and ctx.chunks.later is None  # a product for later gathers its input then
        ctx.regather = regather if together else None
        ctx.number = ctx.regather.number(x) if ctx.regather is not None else 0
        ctx.weight = None if ctx.chunks.later is None else weight  # a recomputed layer saves a copy of it
        product: Tensor = ctx.chunks.product(all_gather_first(x, axis), weight, bias)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        rows = grads[0].reshape(-1, weight.shape[0])  # [rows, out]
        grad_x = grad_weight = grad_bias = None
        if need_x:
            full = ctx.chunks.input_gradient(rows, weight)
            grad_x = reduce_scatter_first(full.view(*grads[0].shape[:-1], weight.shape[1]), ctx.axis)
        if need_weight:
            regather, number, axis = ctx.regather or Regather(), ctx.number, ctx.axis
            grad_weight = ctx.chunks.gradient_of(ctx.weight, rows, lambda: regather.take(number, x, axis))
        if ctx.has_bias and need_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None
