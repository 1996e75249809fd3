"""Gated activations of an MLP on the CPU by a compiled kernel (csrc/activations.cpp), forward and backward.

torch's operators make a copy of each half and of their product; here all is one pass, in fp32, rounded once. Only the
input is saved; the backward pass computes the derivative from it. A plain activation is one pass in torch as well.

Shapes: w width of the output; of the input [..., 2w] the second half is activated and multiplied by the first.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from megatron.kernels.cpp_build import library_unavailable, loaded_library
from megatron.kernels.cpp_call import pointer
from megatron.kernels.cpu_features import unreadable_memory

GATED = ("geglu", "swiglu", "glu", "reglu", "quick_geglu")
"""The activations that the kernel knows, in its order."""


def cpp_activation_unavailable(x: Tensor) -> str | None:
    """Returns the reason why the compiled kernel cannot take an input, or None. May compile it."""
    unreadable = unreadable_memory(x)
    if unreadable is not None:
        return f"The compiled activation {unreadable}."
    return library_unavailable()


def cpp_activation(x: Tensor, name: str) -> Tensor:
    """The activation of that name, one of GATED: [..., 2w] -> [..., w]."""
    kind = GATED.index(name)
    if not torch.is_grad_enabled():  # what autograd does around it takes longer than a few rows
        return _activated(x.contiguous(), kind)
    y: Tensor = _CppActivation.apply(x, kind)
    return y


class _CppActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: int) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.kind = kind
        return _activated(x, kind)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _call(x, grads[0].contiguous(), torch.empty_like(x), ctx.kind), None


def _activated(x: Tensor, kind: int) -> Tensor:
    return _call(x, None, x.new_empty(*x.shape[:-1], x.shape[-1] // 2), kind)


def _call(x: Tensor, dy: Tensor | None, out: Tensor, kind: int) -> Tensor:
    """Writes the activation, or with dy the gradient of the input."""
    loaded = loaded_library()
    rows, width = (ctypes.c_int64(each) for each in (x.numel() // max(1, x.shape[-1]), x.shape[-1] // 2))
    half = int(x.dtype == torch.bfloat16)
    loaded.neox_activation(half, kind, pointer(x), pointer(dy), pointer(out), rows, width, torch.get_num_threads())
    return out
