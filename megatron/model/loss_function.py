"""The objective of a run as the engines call it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron.distributed.mesh import Axis
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets


@dataclass(frozen=True)
class LossFunction:
    """Computes the loss of logits, or says what the output layer needs to compute it without them."""

    objective: Any
    """An object of the registry's objectives."""
    axis: Axis
    """Tensor-parallel ranks."""
    vocabulary: int | None
    """Number of tokens; logits past them get no probability."""
    fused: bool = True
    """Compute the output layer and the loss together where the objective can."""

    def __call__(self, logits: Tensor, labels: Tensor, loss_mask: Tensor, tokens: Tensor) -> Tensor:
        """Returns the sum of the unmasked tokens' losses, divided by `tokens`.

        Args:
            logits: [s, b, v/t].
            labels: token ids [b, s].
            loss_mask: 1 where the token counts [b, s].
            tokens: the divisor.
        """
        value: Tensor = self.objective.loss(
            logits, labels, loss_mask, self.axis, tokens=tokens, vocabulary=self.vocabulary
        )
        return value

    @property
    def in_blocks(self) -> bool:
        """True if the output layer computes the loss, in blocks of tokens.

        An objective that changes the loss of its base class and not its targets is computed from logits.
        """
        if getattr(self.objective, "in_output_layer", False):
            return True
        return self.fused and _order_of(self.objective, "targets") <= _order_of(self.objective, "loss")

    def targets(
        self, labels: Tensor, loss_mask: Tensor, tokens: Tensor, order: Tensor | None = None
    ) -> TokenTargets | None:
        """Returns the targets of the output layer, or None if the loss is computed from logits.

        Args:
            labels: token ids [b, s].
            loss_mask: 1 where the token counts [b, s].
            tokens: the divisor.
            order: 1 where the segments of a sample are swapped [b, 1], where that is learned.
        """
        if not self.in_blocks:
            return None
        more = {} if order is None else {"order": order}
        found: TokenTargets = self.objective.targets(
            labels, loss_mask, tokens=tokens, vocabulary=self.vocabulary, **more
        )
        return found


def _order_of(objective: object, method: str) -> float:
    """Position, in the order in which methods are looked up, of the class that defines one; infinite without it."""
    classes = type(objective).__mro__
    return next((number for number, each in enumerate(classes) if method in vars(each)), float("inf"))
