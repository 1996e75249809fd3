"""Newton-Schulz iterations of Muon: who computes them. The table of kernels names one of these values.

Shapes: r rows, c columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Iterations = Callable[[Tensor, int], Tensor]
"""(matrices [..., r, c], number of iterations) -> nearly semi-orthogonal matrices [..., r, c], in bfloat16."""


@dataclass(frozen=True)
class NewtonSchulz:
    """An implementation of the iterations."""

    compute: Iterations | None = None
    """The iterations; None for those of the library whose Muon runs, torch's or DeepSpeed's."""


NEWTON_SCHULZ = NewtonSchulz()
