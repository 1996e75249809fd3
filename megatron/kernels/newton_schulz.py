"""Newton-Schulz iterations of Muon: who computes them. The table of kernels names one of these values.

An iteration maps X to aX + (bA + cAA)X with A = XXᵀ (https://kellerjordan.github.io/posts/muon).

Shapes: r rows, c columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Coefficients = Sequence[tuple[float, float, float]]
"""a, b and c of each iteration."""
Iterations = Callable[[Tensor, Coefficients], Tensor]
"""(matrices [..., r, c], coefficients) -> nearly semi-orthogonal matrices [..., r, c], in bfloat16."""
STANDARD, POLAR_EXPRESS = "standard", "polar_express"
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of every iteration."""
POLAR_COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Iterations whose largest error over singular values from 0.001 to 1 is the least possible (arXiv:2505.16932)."""
_SAFETY = 1.01
"""Factor by which bfloat16 may let singular values grow beyond the bound of the polynomials (section 3 there)."""


def coefficients(name: str, steps: int) -> Coefficients:
    """Returns a, b and c of each iteration.

    Args:
        name: STANDARD or POLAR_EXPRESS.
        steps: Number of iterations.
    """
    if name == STANDARD:
        return [COEFFICIENTS] * steps
    last = len(POLAR_COEFFICIENTS) - 1
    safe = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in POLAR_COEFFICIENTS[:last]]
    found = [*safe, POLAR_COEFFICIENTS[last]]
    return [found[min(step, last)] for step in range(steps)]


@dataclass(frozen=True)
class NewtonSchulz:
    """An implementation of the iterations."""

    compute: Iterations | None = None
    """The iterations; None for those of torch's Muon."""


def orthogonalize(matrix: Tensor, iterations: Coefficients, epsilon: float = 1e-7) -> Tensor:
    """The iterations as torch's Muon makes them, for many matrices: [..., r, c] -> the same shape, bfloat16.

    Args:
        matrix: Matrices [..., r, c] of any type.
        iterations: a, b and c of each.
        epsilon: Smallest norm that a matrix is divided by.
    """
    x = matrix.bfloat16().reshape(-1, *matrix.shape[-2:])
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.transpose(1, 2)
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp(min=epsilon).to(x.dtype)
    for a, b, c in iterations:
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.transpose(1, 2)).reshape(matrix.shape)


NEWTON_SCHULZ = NewtonSchulz()
