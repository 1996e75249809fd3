"""Activations by other kernels than their own formula, which `megatron/model/mlp/activations.py` has."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Activation = Callable[[Tensor], Tensor]
"""[..., w], or [..., 2w] if it is gated, -> [..., w]."""


def activation_of(name: str, formula: Activation) -> Activation:
    """Returns the activation's own formula, by operators of torch."""
    return formula
