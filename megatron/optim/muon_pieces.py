"""The matrices of which a weight consists, where Muon orthogonalizes each apart: the experts of a stack.

Shapes: p matrices of one size, r their rows, c their columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.distributed.param_attrs import expert_count


@dataclass(frozen=True)
class Pieces:
    """How a weight is cut into matrices."""

    sizes: tuple[tuple[int, int], ...]
    """(p, r) of each batch of matrices, in the order of their rows."""
    order: Tensor | None = None
    """Row of the weight at each row of the batches; None where they are in order."""

    def split(self, weight: Tensor) -> list[Tensor]:
        """[rows, c] -> matrices [p, r, c], a tensor for each size."""
        ordered = weight if self.order is None else weight[self.order]
        parts = ordered.split([count * rows for count, rows in self.sizes])
        return [part.view(*size, -1) for part, size in zip(parts, self.sizes, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Matrices [p, r, c] -> [rows, c]: the inverse of `split`."""
        ordered = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        if self.order is None:
            return ordered
        joined = torch.empty_like(ordered)
        joined[self.order] = ordered
        return joined


def pieces_of(parameter: Parameter, *, experts: bool) -> Pieces:
    """Returns the matrices of a full weight. experts: true if those of a stack are matrices of their own."""
    rows, count = parameter.shape[0], expert_count(parameter)
    return Pieces(((count, rows // count),)) if experts else Pieces(((1, rows),))
