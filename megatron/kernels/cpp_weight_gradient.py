"""The gradient of a linear layer's weight on the CPU by a compiled kernel (csrc/weight_gradient.cpp).

Both operands are read along their rows, so none is transposed in memory, and the product may be added to an fp32 sum.

Shapes: r rows (tokens), out and in the widths of the weight [out, in].
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from megatron.kernels.cpp_build import library_unavailable, loaded_library
from megatron.kernels.cpp_call import pointer
from megatron.kernels.cpu_features import unreadable_memory


def cpp_weight_gradient_unavailable(grad: Tensor, x: Tensor) -> str | None:
    """Returns the reason why the compiled kernel cannot multiply grad [r, out] and x [r, in], or None.

    May compile it.
    """
    unreadable = unreadable_memory(grad) or unreadable_memory(x)
    if unreadable is not None:
        return f"The compiled gradient {unreadable}."
    if grad.dtype != x.dtype:
        return f"The compiled gradient multiplies tensors of one type, not {grad.dtype} and {x.dtype}."
    if grad.stride(1) != 1 or x.stride(1) != 1:
        return "The compiled gradient takes rows of neighbouring numbers."
    return library_unavailable()


def cpp_weight_gradient(grad: Tensor, x: Tensor, total: Tensor | None = None) -> Tensor:
    """gradᵀ x, or the sum of it and `total`, which is changed: [r, out] and [r, in] -> fp32 [out, in]."""
    loaded = loaded_library()
    sizes = (len(grad), grad.shape[1], x.shape[1])
    out = torch.empty(*sizes[1:], dtype=torch.float32) if total is None else total
    if len(grad) == 0:
        return out.zero_() if total is None else out
    loaded.neox_weight_gradient(
        int(grad.dtype == torch.bfloat16),
        pointer(grad),
        pointer(x),
        pointer(out),
        (ctypes.c_int64 * 3)(*sizes),
        (ctypes.c_int64 * 3)(grad.stride(0), x.stride(0), out.stride(0)),
        int(total is not None),
        torch.get_num_threads(),
    )
    return out
