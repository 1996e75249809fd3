"""Layer norm and root mean square norm in one pass over the rows, alone or with the residual sum in front.

The plain implementations are in `megatron/kernels/norms.py`. One program holds a row in registers; in the backward pass
each program loops over rows and sums their terms of the weight's gradient, and torch adds the programs' sums.

Shapes: r rows, h columns (hidden size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.norms import NormKernel
from megatron.kernels.triton import runtime


@triton.jit
def norm_forward(
    x, residual, total, weight, bias, y, mean, rstd, columns, epsilon,
    BLOCK: tl.constexpr, ADD: tl.constexpr, RMS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One program a row: y = norm(x [+ residual]) * weight + bias."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    at = row * columns + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)  # the norm is that of the sum as it is stored
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if not RMS:
        average = tl.sum(value, axis=0) / columns
        tl.store(mean + row, average)
        value = tl.where(inside, value - average, 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / columns + epsilon)
    tl.store(rstd + row, inverse)
    value = value * inverse
    if WEIGHT:
        value = value * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        value = value + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    dy, dtotal, x, weight, mean, rstd, dx, dweight, dbias, rows, columns,
    BLOCK: tl.constexpr, ADD: tl.constexpr, RMS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Each program takes every n-th row: the gradient of its input, and sums of the weight's and bias's gradients."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    for step in range(tl.cdiv(rows - program, programs)):
        row = program + step * programs
        at = row * columns + column
        normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        if RMS:
            normed = normed * inverse
        else:
            normed = tl.where(inside, (normed - tl.load(mean + row)) * inverse, 0.0)
        gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if WEIGHT:
            weight_sum += gradient * normed
        if BIAS:
            bias_sum += gradient
        if WEIGHT:  # read again in every row, from the cache: the registers are needed
            gradient = gradient * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        out = gradient - normed * (tl.sum(gradient * normed, axis=0) / columns)
        if not RMS:
            out = out - tl.sum(gradient, axis=0) / columns
        if ADD:
            out = out * inverse + tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        else:
            out = out * inverse
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(dweight + program * columns + column, weight_sum, mask=inside)
    if BIAS:
        tl.store(dbias + program * columns + column, bias_sum, mask=inside)


@dataclass(frozen=True)
class _NormSettings:
    """Compile-time arguments of a norm."""

    epsilon: float
    rms: bool
    add: bool


def _forward(
    settings: _NormSettings, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [r, h] -> the norm, its input, the means and the inverse deviations [r]."""
    rows, columns = x.shape
    y = torch.empty_like(x)
    total = torch.empty_like(x) if settings.add else x
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    mean = rstd if settings.rms else torch.empty_like(rstd)
    block = runtime.next_power_of_2(columns)
    runtime.launch(
        norm_forward, (rows,), x, x if residual is None else residual, total, x if weight is None else weight,
        x if bias is None else bias, y, mean, rstd, columns, settings.epsilon, BLOCK=block, ADD=settings.add,
        RMS=settings.rms, WEIGHT=weight is not None, BIAS=bias is not None, num_warps=runtime.warps_for(block),
    )  # fmt: skip
    return y, total, mean, rstd


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        settings: _NormSettings,
    ) -> tuple[Tensor, Tensor]:
        rows = runtime.as_rows(x)
        other = None if residual is None else runtime.as_rows(residual)
        y, total, mean, rstd = _forward(settings, rows, other, weight, bias)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.settings, ctx.bias = settings, None if bias is None else bias.dtype
        if not settings.add:
            ctx.mark_non_differentiable(total)
            return y.view(x.shape), total
        return y.view(x.shape), total.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None]:
        total, weight, mean, rstd = ctx.saved_tensors
        settings: _NormSettings = ctx.settings
        (rows, columns), device = total.shape, total.device
        dy, dtotal = runtime.as_rows(grads[0]), runtime.as_rows(grads[1]) if settings.add else total
        programs, block = runtime.persistent_programs(device, rows), runtime.next_power_of_2(columns)
        dx = torch.empty_like(total)
        sums = [
            torch.zeros(programs, columns, dtype=torch.float32, device=device) if given else rstd
            for given in (weight is not None, ctx.bias is not None)
        ]
        runtime.launch(
            norm_backward, (programs,) if rows else (0,), dy, dtotal, total, total if weight is None else weight, mean,
            rstd, dx, *sums, rows, columns, BLOCK=block, ADD=settings.add, RMS=settings.rms, WEIGHT=weight is not None,
            BIAS=ctx.bias is not None, num_warps=runtime.warps_for(block),
        )  # fmt: skip
        dx = dx.view(grads[0].shape)
        dweight = None if weight is None else sums[0].sum(0).to(weight.dtype)
        dbias = None if ctx.bias is None else sums[1].sum(0).to(ctx.bias)
        return dx, dx if settings.add else None, dweight, dbias, None


def rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """X / sqrt(mean(x²) + epsilon) * scale of [..., h]."""
    y: Tensor = _Norm.apply(x, None, scale, None, _NormSettings(epsilon, rms=True, add=False))[0]
    return y


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias of [..., h].

    Args:
        x: Input [..., h].
        weight: Scale [h], or None.
        bias: Shift [h], or None.
        epsilon: Added to the variance.
    """
    y: Tensor = _Norm.apply(x, None, weight, bias, _NormSettings(epsilon, rms=False, add=False))[0]
    return y


def add_rms_norm(x: Tensor, residual: Tensor, scale: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The root mean square norm of x + residual, and the sum, rounded to its type; both [..., h].

    Args:
        x: Term of the sum [..., h].
        residual: The other term [..., h].
        scale: Scale of the norm [h].
        epsilon: Added to the mean square.
    """
    y, total = _Norm.apply(x, residual, scale, None, _NormSettings(epsilon, rms=True, add=True))
    return y, total


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The layer norm of x + residual, and the sum, rounded to its type; both [..., h].

    Args:
        x: Term of the sum [..., h].
        residual: The other term [..., h].
        weight: Scale [h], or None.
        bias: Shift [h], or None.
        epsilon: Added to the variance.
    """
    y, total = _Norm.apply(x, residual, weight, bias, _NormSettings(epsilon, rms=False, add=True))
    return y, total


RMS_NORM = NormKernel(rms_norm, add_rms_norm)
LAYER_NORM = NormKernel(layer_norm, add_layer_norm)
