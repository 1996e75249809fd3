"""Gradients of weights that are computed after the rest of a backward pass.

A pipeline stage that waits for the gradients of its activations does not wait for those of its weights
(arXiv:2401.10241, section 2). While they are collected, linear layers leave a function that computes the gradient of
their weight, and the backward pass goes on without it. What is no such layer (norms, embeddings, experts, biases) has
its gradient in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Deferred = list[tuple[Tensor, Callable[[], Tensor]]]
"""Weights, and the functions that compute their gradients."""


class WeightGradients:
    """Takes the gradients that a backward pass leaves for later; one object for all layers of a model."""

    def __init__(self) -> None:
        self._found: Deferred | None = None

    @contextmanager
    def collect(self) -> Iterator[Deferred]:
        """Within it, a backward pass leaves its gradients of weights in the list."""
        self._found = []
        try:
            yield self._found
        finally:
            self._found = None

    def take(self, weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
        """Returns the gradient of a weight; None if it is computed later.

        A weight that is itself computed, and no parameter, gets its gradient at once.

        Args:
            weight: [out, in].
            compute: computes the gradient, of the same shape.
        """
        if self._found is None or not weight.is_leaf:
            return compute()
        self._found.append((weight, compute))
        return None


def add_deferred(found: Deferred) -> None:
    """Computes gradients and adds them to their weights, as a backward pass does, with its hooks; empties the list.

    The pass that left them has called the same hooks, without a gradient.
    """
    for weight, compute in found:
        with torch.no_grad():
            gradient = compute()
        torch.autograd.backward(weight, gradient)
    found.clear()
