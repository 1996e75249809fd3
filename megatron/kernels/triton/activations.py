"""Bias and activation of an MLP in one launch, plain and gated, with a backward pass in one launch.

The plain implementations are in `megatron/model/mlp/activations.py`. Only the input is saved; the backward pass
computes the activation's derivative from it.

Shapes: r rows, w width of the output; the input is [r, w], or [r, 2w] for a gated activation, whose second half is
activated and multiplied by the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.triton import runtime

GATED = {
    "swiglu": "silu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "reglu": "relu",
    "glu": "sigmoid",
    "bilinear": "identity",
}
"""Gated activation -> the function of its gate."""
PLAIN = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
    "squared_relu": "squared_relu",
    "silu": "silu",
    "swish": "silu",
    "softsign": "softsign",
    "mish": "mish",
}
"""Activation -> its function."""
_BLOCK = 1024


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _value(x, KIND: tl.constexpr):
    """The activation in fp32."""
    if KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif KIND == "relu":
        y = tl.maximum(x, 0.0)
    elif KIND == "squared_relu":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "sigmoid":
        y = tl.sigmoid(x)
    elif KIND == "softsign":
        y = x / (1.0 + tl.abs(x))
    elif KIND == "mish":
        y = x * _tanh(_softplus(x))
    else:
        y = x
    return y


@triton.jit
def _slope(x, KIND: tl.constexpr):
    """The derivative of the activation in fp32."""
    if KIND == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        t = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        y = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    elif KIND == "relu":
        y = tl.where(x > 0.0, 1.0, 0.0)
    elif KIND == "squared_relu":
        y = 2.0 * tl.maximum(x, 0.0)
    elif KIND == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif KIND == "sigmoid":
        s = tl.sigmoid(x)
        y = s * (1.0 - s)
    elif KIND == "softsign":
        y = 1.0 / ((1.0 + tl.abs(x)) * (1.0 + tl.abs(x)))
    elif KIND == "mish":
        t = _tanh(_softplus(x))
        y = t + x * (1.0 - t * t) * tl.sigmoid(x)
    else:
        y = tl.full(x.shape, 1.0, tl.float32)
    return y


@triton.jit
def activation_forward(
    x, bias, y, width, BLOCK: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr, BIAS: tl.constexpr
):
    """One program a block of columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * width * (2 if IS_GATED else 1) + column
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        first += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if IS_GATED:
        gate = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            gate += tl.load(bias + width + column, mask=inside, other=0.0).to(tl.float32)
        out = first * _value(gate, KIND)
    else:
        out = _value(first, KIND)
    tl.store(y + row * width + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def activation_backward(
    dy, x, bias, dx, width, BLOCK: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr, BIAS: tl.constexpr
):
    """One program a block of columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * width * (2 if IS_GATED else 1) + column
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        first += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if IS_GATED:
        gate = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            gate += tl.load(bias + width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, (gradient * _value(gate, KIND)).to(dx.dtype.element_ty), mask=inside)
        gated = gradient * first * _slope(gate, KIND)
        tl.store(dx + at + width, gated.to(dx.dtype.element_ty), mask=inside)
    else:
        tl.store(dx + at, (gradient * _slope(first, KIND)).to(dx.dtype.element_ty), mask=inside)


class _BiasActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kind: str, gated: bool) -> Tensor:
        rows = runtime.as_rows(x)
        width = rows.shape[1] // 2 if gated else rows.shape[1]
        y = torch.empty(rows.shape[0], width, dtype=x.dtype, device=x.device)
        ctx.save_for_backward(rows, bias)
        ctx.settings = {"BLOCK": min(_BLOCK, runtime.next_power_of_2(width)), "KIND": kind, "IS_GATED": gated}
        ctx.settings |= {"BIAS": bias is not None}
        ctx.grid = (rows.shape[0], runtime.cdiv(width, ctx.settings["BLOCK"]))
        runtime.launch(activation_forward, ctx.grid, rows, rows if bias is None else bias, y, width, **ctx.settings)
        return y.view(*x.shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        rows, bias = ctx.saved_tensors
        dy, dx = runtime.as_rows(grads[0]), torch.empty_like(rows)
        given = rows if bias is None else bias
        runtime.launch(activation_backward, ctx.grid, dy, rows, given, dx, dy.shape[1], **ctx.settings)
        dbias = None if bias is None else dx.sum(0, dtype=torch.float32).to(bias.dtype)
        return dx.view(*grads[0].shape[:-1], dx.shape[1]), dbias, None, None


def activation_of(name: str, formula: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns the activation of that name; its formula is not used."""
    return lambda x: bias_activation(x, None, name)


def bias_activation(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """The activation of x + bias: [..., w], or [..., 2w] if it is gated, -> [..., w].

    Args:
        x: Output of the first linear layer of an MLP.
        bias: Its bias, or None.
        name: A key of PLAIN or GATED.
    """
    y: Tensor = _BiasActivation.apply(x, bias, GATED.get(name) or PLAIN[name], name in GATED)
    return y
