"""Activations by other kernels than their own formula, which `megatron/model/mlp/activations.py` has."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron.kernels.cpp_activations import GATED, cpp_activation, cpp_activation_unavailable

Activation = Callable[[Tensor], Tensor]
"""[..., w], or [..., 2w] if it is gated, -> [..., w]."""


def activation_of(name: str, formula: Activation) -> Activation:
    """Returns the activation's own formula, by operators of torch; a gated one on a CPU by a compiled loop."""
    if name not in GATED:
        return formula

    def activation(x: Tensor) -> Tensor:
        return cpp_activation(x, name) if cpp_activation_unavailable(x) is None else formula(x)

    return activation
