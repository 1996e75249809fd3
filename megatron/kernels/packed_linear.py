"""The product x Wᵀ + bias with W laid out once, for a model that only generates.

oneDNN reads a weight fastest in blocks of its own; with a plain matrix it lays the blocks out anew in every call, which
for the few rows of a decoding step costs more than the product. A packed weight cannot be trained or saved. On a
processor without instructions for bfloat16 such a weight is kept, and multiplied, in fp32.

Shapes: leading dimensions are free; in and out are the widths of this rank's weight [out, in].
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.linear import LinearKernel
from megatron.kernels.processor import widens


def packing_unavailable(weight: Tensor) -> str | None:
    """Why a weight cannot be packed, as a sentence; None where it can."""
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
    """A kernel of this one weight [out, in]; it holds its own copy and reads no other.

    rows: how many rows of x are usual, which the layout is chosen for; any number works.
    """
    if widens(weight.device, weight.dtype):
        return _rounded(packed_linear(weight.float(), rows), weight.dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    product = torch.ops.mkldnn._linear_pointwise.default

    def kernel(x: Tensor, _weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = product(x, packed, bias, "none", [], "")
        return out

    return kernel


def _rounded(wide: LinearKernel, dtype: torch.dtype) -> LinearKernel:
    """The kernel of a wider type for tensors of `dtype`."""

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return wide(x.float(), weight, None if bias is None else bias.float()).to(dtype)

    return kernel
