"""Grouped matrix product: each group of rows with its own matrix, for the experts of an MoE layer.

The rows of a group are contiguous, in the order of the matrices. A group may be empty.

Shapes: m rows of all groups, e groups, in and out the widths of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.kernels.cpu_features import needs_fp32_matmul
from megatron.kernels.frozen_linear import FrozenMatrix
from megatron.kernels.linear import widened_linear

ALIGNED = 8
"""Values in bfloat16 of which torch's kernel needs a multiple in each row."""
GroupedKernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [m, in], matrices [e, in, out], rows of each group [e]) -> [m, out]."""


def plain_grouped(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Reference implementation: one product a group. An empty group gives its matrix a gradient of zeros."""
    product = _widened if needs_fp32_matmul(rows.device, rows.dtype) else torch.mm
    parts = rows.split(counts.tolist())
    return torch.cat([product(part, matrix) for part, matrix in zip(parts, matrices.unbind(), strict=True)])


def _widened(rows: Tensor, matrix: Tensor) -> Tensor:
    return widened_linear(rows, matrix.t(), None) if len(rows) else rows @ matrix


def grouped_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the reason why torch's grouped product cannot be used, or None."""
    if device.type != "cuda":
        return f"torch's grouped product is for CUDA, and the model is on {device.type}."
    if dtype != torch.bfloat16:
        return f"torch's grouped product is for bfloat16, and the model is in {dtype}."
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "torch's grouped product needs a GPU of compute capability 8.0."
    if not hasattr(F, "grouped_mm"):
        return "This version of torch has no grouped product."
    return None


def fused_grouped(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """One kernel for all groups, without synchronizing with the host for their sizes."""
    ends = counts.cumsum(0).to(torch.int32)
    product: Tensor = F.grouped_mm(rows, matrices, offs=ends)
    return product


def frozen_grouped(
    product: GroupedKernel, rows: Tensor, matrix: FrozenMatrix, counts: Tensor, *, turned: bool
) -> Tensor:
    """The product with frozen matrices that are stored in few bits, [m, out]; autograd saves none of them.

    Args:
        product: grouped product.
        rows: [m, in].
        matrix: of all groups, one below the other.
        counts: rows of each group [e].
        turned: true if the matrices are [out, in], false for [in, out].
    """
    found: Tensor = _FrozenGrouped.apply(rows, counts, matrix, product, turned)
    return found


class _FrozenGrouped(torch.autograd.Function):
    """The product with frozen matrices, and the gradient of its rows."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: Tensor, matrix: FrozenMatrix, product: GroupedKernel, turned: bool
    ) -> Tensor:
        ctx.save_for_backward(counts)
        ctx.matrix, ctx.product, ctx.turned = matrix, product, turned
        return product(rows, _stacked(matrix, counts, turned=turned), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (counts,) = ctx.saved_tensors
        stack = _stacked(ctx.matrix, counts, turned=not ctx.turned)
        return ctx.product(grads[0].contiguous(), stack, counts), None, None, None, None


def _stacked(matrix: FrozenMatrix, counts: Tensor, *, turned: bool) -> Tensor:
    """The matrices of all groups, [e, in, out]. turned: true if they are stored as [out, in]."""
    stack = matrix.expanded().unflatten(0, (len(counts), -1))
    return stack.transpose(1, 2) if turned else stack


def low_rank_grouped(
    product: GroupedKernel, rows: Tensor, matrices: tuple[Tensor, ...], counts: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Products of rows with scale A B for one A and several B of each group, [m, out] each.

    torch's kernel needs rows of 16 bytes, so that it gets A and B with a rank that was padded to a multiple of 8.

    Args:
        product: grouped product.
        rows: [m, in].
        matrices: A [e, in, r], then each B [e, r, out].
        counts: rows of each group [e].
        scale: of the products.
    """
    down, *ups = matrices
    missing = -down.shape[-1] % ALIGNED if product is fused_grouped else 0
    if missing:
        down = F.pad(down, (0, missing))
        ups = [F.pad(up, (0, 0, 0, missing)) for up in ups]
    low = product(rows, down, counts) * scale  # [m, r]
    return tuple(product(low, up, counts) for up in ups)


def choose_grouped(device: torch.device, dtype: torch.dtype) -> GroupedKernel:
    """Returns the fastest grouped product for parameters of this type on this device."""
    return fused_grouped if grouped_unavailable(device, dtype) is None else plain_grouped
