"""The product x Wᵀ + bias with a packed W, for inference.

oneDNN reads a weight fastest in its own blocked layout; it reorders a plain matrix in every call, which for the few
rows of a decoding step costs more than the product. A packed weight cannot be trained or saved. On a CPU without
AVX-512 a compiled loop over panels of our own (csrc/packed_linear.cpp) is faster for fp32. On one without instructions
for bfloat16 another (csrc/linear.cpp) reads such a weight directly for a few rows; without a compiler the weight is
stored, and multiplied, in fp32.

Shapes: leading dimensions are free; in and out are the widths of this rank's weight [out, in].
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from megatron.kernels.cpp_build import library, loaded_library
from megatron.kernels.cpp_call import pointer
from megatron.kernels.cpu_features import needs_fp32_matmul
from megatron.kernels.linear import LinearKernel, choose_linear, linear_ops

FEW = 16
"""Rows of x up to which reading the weight costs more than multiplying."""

BLOCK = 512
"""Rows of a weight that are converted to fp32 at once."""


def packing_unavailable(weight: Tensor) -> str | None:
    """Returns the reason why a weight cannot be packed, or None."""
    if weight.device.type != "cpu":
        return f"oneDNN packs weights for the CPU, and this one is on {weight.device.type}."
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN does not pack {weight.dtype}."
    if not torch.backends.mkldnn.is_available():
        return "This build of torch has no oneDNN."
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return "This version of torch does not offer oneDNN's packing as an operator."
    return None


def packed_linear(weight: Tensor, rows: int = 8) -> LinearKernel:
    """Returns a kernel of this one weight [out, in]; it has its own copy and ignores its weight argument.

    rows: usual rows of x, for which the layout is chosen; any number works.
    """
    if needs_fp32_matmul(weight.device, weight.dtype):
        if few_rows_unavailable(weight) is None:
            return few_rows_linear(weight.detach())
        return _rounded(packed_linear(weight.float(), rows), weight.dtype)
    if panels_unavailable(weight) is None:
        return panel_linear(weight.detach())
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    product = torch.ops.mkldnn._linear_pointwise.default

    def kernel(x: Tensor, _weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = product(x, packed, bias, "none", [], "")
        return out

    return kernel


def panels_unavailable(weight: Tensor) -> str | None:
    """Returns the reason why a weight cannot be packed in panels of our own, or None. May compile the loop."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return f"The compiled panels are fp32 on the CPU, not {weight.dtype} on {weight.device.type}."
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        return "oneDNN's packed weights are for processors with AVX-512."
    found = library()
    return found if isinstance(found, str) else None


def panel_linear(weight: Tensor) -> LinearKernel:
    """Returns a kernel of this one fp32 weight [out, in], of which it has a copy in panels."""
    loaded, (out_features, in_features) = loaded_library(), weight.shape
    loaded.neox_packed_size.restype = ctypes.c_int64
    packed = torch.empty(loaded.neox_packed_size((ctypes.c_int64 * 3)(0, *weight.shape)), dtype=torch.float32)
    loaded.neox_pack(pointer(weight.contiguous()), pointer(packed), (ctypes.c_int64 * 3)(0, *weight.shape))
    product = loaded.neox_packed_product

    def kernel(x: Tensor, _weight: Tensor, bias: Tensor | None) -> Tensor:
        x, out = x.contiguous(), x.new_empty(*x.shape[:-1], out_features)
        sizes = (ctypes.c_int64 * 3)(x.numel() // in_features, out_features, in_features)
        product(pointer(x), pointer(packed), pointer(bias), pointer(out), sizes, torch.get_num_threads())
        return out

    return kernel


def few_rows_unavailable(weight: Tensor) -> str | None:
    """Returns the reason why the compiled loop cannot take a weight, or None. May compile it."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return f"The compiled product is for bfloat16 on the CPU, not for {weight.dtype} on {weight.device.type}."
    if weight.shape[1] % 16 or not weight.is_contiguous():
        return "The compiled product takes contiguous rows of a multiple of 16 elements."
    found = library()
    return found if isinstance(found, str) else None


def few_rows_linear(weight: Tensor) -> LinearKernel:
    """Returns a kernel of this one bfloat16 weight [out, in], which it reads directly. Many rows are multiplied in
    fp32.
    """
    loaded = library()
    assert isinstance(loaded, ctypes.CDLL), "few_rows_unavailable said that it can be used"
    out_features, in_features = weight.shape

    def kernel(x: Tensor, _weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.numel() // in_features
        if rows > FEW:
            return _in_blocks(x, weight, bias)
        x, out = x.contiguous(), x.new_empty(*x.shape[:-1], out_features)
        loaded.neox_few_rows(
            *(None if each is None else ctypes.c_void_p(each.data_ptr()) for each in (x, weight, bias, out)),
            (ctypes.c_int64 * 3)(rows, out_features, in_features),
            ctypes.c_int(torch.get_num_threads()),
        )
        return out

    return kernel


def _in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes the product in fp32, some rows of the weight at a time, so that their fp32 copies stay in the cache."""
    blocks = weight.split(BLOCK)
    biases = [None] * len(blocks) if bias is None else bias.float().split(BLOCK)
    product = linear_ops(choose_linear(x.device, torch.float32)).product
    wide = x.float()
    found = [product(wide, block.float(), some).to(x.dtype) for block, some in zip(blocks, biases, strict=True)]
    return torch.cat(found, dim=-1)


def _rounded(wide: LinearKernel, dtype: torch.dtype) -> LinearKernel:
    """Returns the kernel of a wider type for tensors of `dtype`."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return wide(x.float(), weight, None if bias is None else bias.float()).to(dtype)

    return kernel
