"""The recipes of products in FP8: formats, what shares a scale, and what sizes and GPUs they need.

Without torch, so that a configuration can be checked before any worker starts; `megatron/kernels/fp8.py` computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

BLOCK = 128
"""Side of a block of the recipe `blockwise`."""
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"


class ScaleSharing(Enum):
    """Which values of an operand [rows, summed] share a scale."""

    TENSOR = "all"
    ROW = "a row"
    TILE = "128 values of a row"
    BLOCK = "128 rows x 128 values"


@dataclass(frozen=True)
class Fp8Recipe:
    """How the operands of the three products of a linear layer are rounded."""

    values: ScaleSharing
    """ScaleSharing of inputs, of gradients, and of both operands of the weight gradient."""
    weights: ScaleSharing
    """ScaleSharing of weights."""
    gradient_format: str
    """Format of the gradients of outputs, as torch spells it; everything else is e4m3."""
    power_of_two: bool
    """True to round scales up to powers of two."""
    multiple: int
    """Divisor of every dimension of a product."""
    capability: tuple[int, int]
    """Least compute capability of a GPU."""


FP8_RECIPES: Mapping[str, Fp8Recipe] = MappingProxyType(
    {
        "tensorwise": Fp8Recipe(
            ScaleSharing.TENSOR, ScaleSharing.TENSOR, E5M2, power_of_two=False, multiple=16, capability=(8, 9)
        ),
        "rowwise": Fp8Recipe(
            ScaleSharing.ROW, ScaleSharing.ROW, E4M3, power_of_two=True, multiple=16, capability=(9, 0)
        ),
        "blockwise": Fp8Recipe(
            ScaleSharing.TILE, ScaleSharing.BLOCK, E4M3, power_of_two=False, multiple=BLOCK, capability=(9, 0)
        ),
    }
)
"""Name in `fp8: {recipe: ...}` -> recipe."""
