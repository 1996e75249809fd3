"""Root mean square norm on the CPU by a compiled kernel (csrc/norms.cpp), alone and of a residual sum.

torch's operator makes several passes over the memory, six in the backward pass; here each direction is one, in fp32.

Shapes: h hidden; leading dimensions are free.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from megatron.kernels.cpp_build import library_unavailable, loaded_library
from megatron.kernels.cpp_call import pointer
from megatron.kernels.cpu_features import unreadable_memory

_ROWS = 32
"""Rows whose gradients of the scale are one part of the sum, as in csrc/norms.cpp."""


def cpp_norm_unavailable(x: Tensor, scale: Tensor) -> str | None:
    """Returns the reason why the compiled kernel cannot take x [..., h] and scale [h], or None. May compile it."""
    unreadable = unreadable_memory(x) or unreadable_memory(scale)
    if unreadable is not None:
        return f"The compiled norm {unreadable}."
    if x.dtype != scale.dtype or x.numel() == 0:
        return f"The compiled norm takes a scale of the type of its input, not {scale.dtype} for {x.dtype}."
    return library_unavailable()


def cpp_rms_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """X / sqrt(mean(x²) + epsilon) * scale: [..., h] -> [..., h]."""
    if not torch.is_grad_enabled():  # what autograd does around it takes longer than a few rows
        return _norm(x.contiguous(), None, scale.contiguous(), epsilon)[0]
    y: Tensor = _RMSNorm.apply(x, None, scale, epsilon)[0]
    return y


def cpp_rms_norm_of_sum(x: Tensor, residual: Tensor, scale: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm of residual + x, and the sum, rounded to its type; all [..., h].

    Args:
        x: A term of the residual stream.
        residual: The stream, of the same type.
        scale: [h].
        epsilon: Added to the mean of the squares.
    """
    if not torch.is_grad_enabled():
        y, total, _ = _norm(x.contiguous(), residual.contiguous(), scale.contiguous(), epsilon)
        assert total is not None
        return y, total
    y, total = _RMSNorm.apply(x, residual, scale, epsilon)
    return y, total


def _norm(x: Tensor, residual: Tensor | None, scale: Tensor, epsilon: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns the norm, the sum if there is a residual, and the inverse roots of the rows, fp32; all are contiguous."""
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    roots = torch.empty(x.shape[:-1], dtype=torch.float32)
    tensors = _pointers(x, residual, scale, total, y)
    rows, width, threads = _sizes(x)
    half = int(x.dtype == torch.bfloat16)
    loaded_library().neox_rms_norm(half, tensors, pointer(roots), rows, width, ctypes.c_float(epsilon), threads)
    return y, total, roots


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, scale: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor | None]:
        x, scale = x.contiguous(), scale.contiguous()
        residual = None if residual is None else residual.contiguous()
        y, total, roots = _norm(x, residual, scale, epsilon)
        ctx.save_for_backward(x if total is None else total, scale, roots)
        ctx.has_residual = residual is not None
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, None]:
        x, scale, roots = ctx.saved_tensors
        dy, dtotal = (None if each is None else each.contiguous() for each in grads)
        dx, (rows, width, threads) = torch.empty_like(x), _sizes(x)
        parts = torch.empty(-(-rows.value // _ROWS), width.value, dtype=torch.float32)
        tensors = _pointers(dy, dtotal, x, scale, dx)
        half = int(x.dtype == torch.bfloat16)
        loaded_library().neox_rms_norm_backward(half, tensors, pointer(roots), pointer(parts), rows, width, threads)
        return dx, dx if ctx.has_residual else None, parts.sum(0).to(scale.dtype), None


def _pointers(*tensors: Tensor | None) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(pointer(each).value for each in tensors))


def _sizes(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64, int]:
    """Rows, width and threads."""
    width = x.shape[-1]
    return ctypes.c_int64(x.numel() // width), ctypes.c_int64(width), torch.get_num_threads()
