"""Newton-Schulz iterations of Muon in fp32, for a CPU that has no instructions for bfloat16.

torch's Muon multiplies in bfloat16, which such a CPU does element by element. Here the iterations run on the smaller of
the two Gram matrices: with G = XXᵀ, an iteration is P = aI + bG + cGG, then X becomes PX and G becomes PGP. All of
these are polynomials of the first G, so they commute and are symmetric: the product of all P is applied to X once, and
only blocks on and below the diagonal are computed. bfloat16 would lose the small eigenvalues of G, fp32 does not.

Shapes: r rows, c columns of a matrix, r at most c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.cpu_features import needs_fp32_matmul
from megatron.kernels.newton_schulz import Coefficients, Iterations

_BLOCK = 128
"""Rows of a block; smaller ones make the products slower than they save."""


def cpu_iterations(device: torch.device) -> Iterations | None:
    """Returns the iterations for matrices on a device; None where torch's are as good."""
    return fp32_orthogonalize if needs_fp32_matmul(device, torch.bfloat16) else None


def fp32_orthogonalize(matrix: Tensor, iterations: Coefficients, epsilon: float = 1e-7) -> Tensor:
    """The iterations as torch's Muon makes them, with products in fp32: [..., r, c] -> the same shape, bfloat16.

    Args:
        matrix: Matrices of any type, wide or tall.
        iterations: a, b and c of each.
        epsilon: Smallest norm that a matrix is divided by.
    """
    parts = matrix.bfloat16().float().reshape(-1, *matrix.shape[-2:])
    found = [_orthogonalized(part, iterations, epsilon) for part in parts]
    return torch.stack(found).reshape(matrix.shape).bfloat16()


def _orthogonalized(matrix: Tensor, iterations: Coefficients, epsilon: float) -> Tensor:
    """One matrix in fp32, in any orientation, to the same shape."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.t()
    x = x / x.norm().clamp(min=epsilon)
    if x.shape[1] < 2 * x.shape[0]:  # the products with X cost less than those that replace them
        for a, b, c in iterations:
            x = torch.addmm(x, _symmetric_polynomial(_symmetric(x, x), b, c), x, beta=a)
    else:
        x = _all_factors(_symmetric(x, x), iterations) @ x
    return x if wide else x.t()


def _all_factors(gram: Tensor, iterations: Coefficients) -> Tensor:
    """Returns the product of the factors P of all iterations [r, r]. gram: XXᵀ at the start."""
    product = None
    for step, (a, b, c) in enumerate(iterations):
        factor = _symmetric_polynomial(gram, b, c)
        factor.diagonal().add_(a)
        product = factor if product is None else _symmetric(factor, product)
        if step + 1 < len(iterations):
            gram = _symmetric(factor, _symmetric(factor, gram))
    return torch.eye(len(gram), dtype=gram.dtype) if product is None else product


def _symmetric_polynomial(gram: Tensor, b: float, c: float) -> Tensor:
    """Returns b G + c G G [r, r] of a symmetric G."""
    return _symmetric(gram, gram).mul_(c).add_(gram, alpha=b)


def _symmetric(left: Tensor, right: Tensor) -> Tensor:
    """Returns left rightᵀ, which is symmetric: [r, k] and [r, k] -> [r, r]."""
    rows = len(left)
    out = left.new_empty(rows, rows)
    for start in range(0, rows, _BLOCK):
        stop = min(start + _BLOCK, rows)
        torch.mm(left[start:stop], right[:stop].t(), out=out[start:stop, :stop])
        out[:start, start:stop] = out[start:stop, :start].t()
    return out
