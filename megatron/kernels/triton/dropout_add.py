"""residual + dropout(x + bias) in one launch. The mask is not stored: the backward pass draws it again from its seed.

The random numbers are those of Philox, one for each element by its index, so they do not depend on blocks or grids.
Shapes: r rows, h columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.triton import runtime

_BLOCK = 1024


@triton.jit
def bias_dropout_residual(
    x, bias, residual, seed, y, columns, count, probability,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One program a block of elements: y = [residual +] mask * (x [+ bias]) / (1 - probability)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + at % columns, mask=inside, other=0.0).to(tl.float32)
    used = tl.rand(tl.load(seed), at) >= probability
    value = tl.where(used, value / (1.0 - probability), 0.0)
    if ADD:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


def _launch(x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor, probability: float) -> Tensor:
    y = torch.empty_like(x)
    runtime.launch(
        bias_dropout_residual, (runtime.cdiv(x.numel(), _BLOCK),), x, x if bias is None else bias,
        x if residual is None else residual, seed, y, x.shape[-1], x.numel(), probability,
        BLOCK=_BLOCK, BIAS=bias is not None, ADD=residual is not None,
    )  # fmt: skip
    return y


class _BiasDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor, seed: Tensor, probability: float) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.probability, ctx.bias = probability, None if bias is None else bias.dtype
        rows, other = runtime.as_rows(x), runtime.as_rows(residual)
        return _launch(rows, bias, other, seed, probability).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        (seed,) = ctx.saved_tensors
        rows = runtime.as_rows(grads[0])
        dx = _launch(rows, None, None, seed, ctx.probability)
        dbias = None if ctx.bias is None else dx.sum(0, dtype=torch.float32).to(ctx.bias)
        return dx.view(grads[0].shape), dbias, grads[0], None, None


def bias_dropout_add(
    x: Tensor, bias: Tensor | None, residual: Tensor, probability: float, seed: Tensor | None = None
) -> Tensor:
    """Residual + dropout(x + bias): [..., h].

    Args:
        x: Term of the residual stream [..., h].
        bias: Bias [h], or None.
        residual: The residual stream [..., h].
        probability: Probability that an element is dropped; 0 drops none.
        seed: int64 scalar on the device; drawn from the device's generator if None.
    """
    if seed is None:
        limit = 2**31 if probability else 1
        seed = torch.randint(0, limit, (1,), dtype=torch.int64, device=x.device)
    y: Tensor = _BiasDropoutAdd.apply(x, bias, residual, seed, probability)
    return y


def dropout_add(x: Tensor, residual: Tensor, probability: float) -> Tensor:
    """Residual + dropout(x) of [..., h], with a seed of the device's generator."""
    return bias_dropout_add(x, None, residual, probability)
