"""Newton-Schulz iterations of Muon: who computes them. The table of kernels names one of these values.

An iteration maps X to aX + (bA + cAA)X with A = XXᵀ (https://kellerjordan.github.io/posts/muon).

Shapes: r rows, c columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of every iteration."""
Iterations = Callable[[Tensor, int], Tensor]
"""(matrices [..., r, c], number of iterations) -> nearly semi-orthogonal matrices [..., r, c], in bfloat16."""


@dataclass(frozen=True)
class NewtonSchulz:
    """An implementation of the iterations."""

    compute: Iterations | None = None
    """The iterations; None for those of torch's Muon."""


def orthogonalize(matrix: Tensor, steps: int, epsilon: float = 1e-7) -> Tensor:
    """The iterations as torch's Muon makes them, for many matrices: [..., r, c] -> the same shape, bfloat16.

    Args:
        matrix: Matrices [..., r, c] of any type.
        steps: Number of iterations.
        epsilon: Smallest norm that a matrix is divided by.
    """
    x = matrix.bfloat16().reshape(-1, *matrix.shape[-2:])
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.transpose(1, 2)
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp(min=epsilon).to(x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.transpose(1, 2)).reshape(matrix.shape)


NEWTON_SCHULZ = NewtonSchulz()
