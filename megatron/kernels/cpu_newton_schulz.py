"""Newton-Schulz iterations of Muon on a CPU: of symmetric products only blocks on and below the diagonal are computed.

With instructions for bfloat16 the iterations are those of torch's Muon, X to aX + (bG + cGG)X with G = XXᵀ: G and GG
are symmetric. Without them such products are computed element by element, so the iterations run in fp32 on the smaller
of the two Gram matrices: with P = aI + bG + cGG, X becomes PX and G becomes PGP. All of these are polynomials of the
first G, so they commute and are symmetric: the product of all P is applied to X once. bfloat16 would lose the small
eigenvalues of G, fp32 does not.

Shapes: r rows, c columns of a matrix, r at most c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.kernels.cpu_features import needs_fp32_matmul
from megatron.kernels.newton_schulz import Coefficients, Iterations

_BLOCK = 128
"""Rows of a block; smaller ones make the products slower than they save."""

_SMALL = 256
"""Rows up to which all blocks are computed by one product."""


def cpu_iterations(device: torch.device) -> Iterations | None:
    """Returns the iterations for matrices on a device; None if it is no CPU."""
    if device.type != "cpu":
        return None
    return fp32_orthogonalize if needs_fp32_matmul(device, torch.bfloat16) else bf16_orthogonalize


def bf16_orthogonalize(matrix: Tensor, iterations: Coefficients, epsilon: float = 1e-7) -> Tensor:
    """The iterations as torch's Muon makes them: [..., r, c] -> the same shape, bfloat16.

    Args:
        matrix: Matrices of any type, wide or tall.
        iterations: a, b and c of each.
        epsilon: Smallest norm that a matrix is divided by.
    """
    parts = matrix.bfloat16().reshape(-1, *matrix.shape[-2:])
    found = [_orthogonalized_bf16(part, iterations, epsilon) for part in parts]
    joined = torch.stack(found) if len(found) > 1 else found[0].unsqueeze(0)
    return joined.reshape(matrix.shape)


def _orthogonalized_bf16(matrix: Tensor, iterations: Coefficients, epsilon: float) -> Tensor:
    """One matrix in bfloat16, in any orientation, to the same shape."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix / matrix.norm().clamp(min=epsilon)
    for a, b, c in iterations:
        rows = x if wide else x.t()
        gram = _symmetric(rows, rows)
        factor = _symmetric(gram, gram, add=gram, beta=b, alpha=c)
        x = torch.addmm(x, factor, x, beta=a) if wide else torch.addmm(x, x, factor, beta=a)
    return x


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


def _symmetric(
    left: Tensor, right: Tensor, *, add: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """Returns beta add + alpha left rightᵀ, which is symmetric: [r, r].

    Args:
        left: [r, k].
        right: [r, k].
        add: Symmetric matrix [r, r], or None.
        beta: Its factor.
        alpha: Factor of the product.
    """

    def product(start: int, stop: int) -> Tensor:
        some, turned = left[start:stop], right[:stop].t()
        if add is None:
            return some @ turned
        return torch.addmm(add[start:stop, :stop], some, turned, beta=beta, alpha=alpha)

    rows = len(left)
    if rows <= _SMALL:
        return product(0, rows)
    out = left.new_empty(rows, rows)
    for start in range(0, rows, _BLOCK):
        stop = min(start + _BLOCK, rows)
        part = product(start, stop)
        out[start:stop, :stop] = part
        out[:start, start:stop] = part[:, :start].t()
    return out
