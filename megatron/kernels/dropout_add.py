"""Dropout of a term of the residual stream, and the sum."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

DropoutAdd = Callable[[Tensor, Tensor, float], Tensor]
"""(term [..., h], residual [..., h], probability) -> residual + dropout(term)."""


def dropout_add(x: Tensor, residual: Tensor, probability: float) -> Tensor:
    """Returns residual + dropout(x), by operators of torch."""
    return residual + F.dropout(x, probability)
