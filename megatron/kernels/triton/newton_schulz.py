"""Newton-Schulz iterations of Muon, whose products are symmetric: only half of their blocks are computed.

An iteration maps X to aX + (bA + cAA)X with A = XXᵀ (https://kellerjordan.github.io/posts/muon). A and AA are
symmetric, so a program computes a block below the diagonal and stores it above the diagonal too.

Shapes: p matrices, r rows, c columns of a matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.newton_schulz import Coefficients, NewtonSchulz
from megatron.kernels.triton import runtime
from megatron.registry.kernels import interpreted

_BLOCK, _DEPTH = 64, 32


@triton.jit
def symmetric_product(
    x, other, out, rows, columns, matrix, row, column, alpha, beta,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program a block on or below the diagonal: out = alpha * x xᵀ [+ beta * other]."""
    number = tl.program_id(0)
    below = (tl.sqrt(2.0 * number + 0.25) - 0.5).to(tl.int32)  # block row: number = below (below + 1) / 2 + left
    below = tl.where(below * (below + 1) // 2 > number, below - 1, below)
    below = tl.where((below + 1) * (below + 2) // 2 <= number, below + 1, below)
    left = number - below * (below + 1) // 2
    batch = tl.program_id(1).to(tl.int64)
    i, j = below * BLOCK + tl.arange(0, BLOCK), left * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, DEPTH)
    first = x + batch * matrix + i.to(tl.int64)[:, None] * row
    second = x + batch * matrix + j.to(tl.int64)[:, None] * row
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, columns, DEPTH):
        at = (start + depth).to(tl.int64)[None, :] * column
        inside = (start + depth)[None, :] < columns
        a = tl.load(first + at, mask=(i[:, None] < rows) & inside, other=0.0)
        b = tl.load(second + at, mask=(j[:, None] < rows) & inside, other=0.0)
        if WIDE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    mask = (i[:, None] < rows) & (j[None, :] < rows)
    square = batch * rows * rows
    lower = square + i.to(tl.int64)[:, None] * rows + j[None, :]
    total = total * alpha
    if ADD:
        total += beta * tl.load(other + lower, mask=mask, other=0.0).to(tl.float32)
    total = total.to(out.dtype.element_ty)
    tl.store(out + lower, total, mask=mask)
    upper = square + j.to(tl.int64)[:, None] * rows + i[None, :]
    tl.store(out + upper, tl.trans(total), mask=(j[:, None] < rows) & (i[None, :] < rows))


def scaled_symmetric(x: Tensor, alpha: float = 1.0, other: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """Alpha * x xᵀ + beta * other: x [p, r, c], other symmetric [p, r, r] -> [p, r, r].

    Args:
        x: Matrices.
        alpha: Factor of the product.
        other: Symmetric matrices, or None.
        beta: Their factor.
    """
    count, rows, columns = x.shape
    out = x.new_empty(count, rows, rows)
    blocks = runtime.cdiv(rows, _BLOCK)
    runtime.launch(
        symmetric_product, (blocks * (blocks + 1) // 2, count), x, out if other is None else other, out, rows, columns,
        *x.stride(), alpha, beta, BLOCK=_BLOCK, DEPTH=_DEPTH, ADD=other is not None, WIDE=interpreted(),
    )  # fmt: skip
    return out


def orthogonalize(matrix: Tensor, iterations: Coefficients, epsilon: float = 1e-7) -> Tensor:
    """The nearest semi-orthogonal matrix, approximately: [..., r, c] -> the same shape and type.

    Args:
        matrix: Matrices [..., r, c].
        iterations: a, b and c of each.
        epsilon: Smallest norm that a matrix is divided by.
    """
    x = matrix.reshape(-1, *matrix.shape[-2:])
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.transpose(1, 2)
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp(min=epsilon).to(x.dtype)
    for a, b, c in iterations:
        gram = scaled_symmetric(x)
        x = torch.baddbmm(x, scaled_symmetric(gram, c, gram, b), x, beta=a)
    return (x if wide else x.transpose(1, 2)).reshape(matrix.shape)


def orthogonalize_in_bfloat16(matrix: Tensor, iterations: Coefficients) -> Tensor:
    """The iterations in bfloat16, as torch's Muon has them: [..., r, c] -> the same shape, bfloat16.

    Args:
        matrix: Matrices [..., r, c] of any type.
        iterations: a, b and c of each.
    """
    return orthogonalize(matrix.bfloat16(), iterations)


NEWTON_SCHULZ = NewtonSchulz(orthogonalize_in_bfloat16)
