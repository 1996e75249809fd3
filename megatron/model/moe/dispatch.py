"""Which token goes to which expert, and which assignments an expert without a free slot drops.

Shapes: n tokens, k experts of a token, m assigned rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """The assignments of n tokens that are not dropped, ordered by expert and then by token."""

    order: Tensor
    """Indices in the flattened [n, k], [m]."""
    counts: Tensor
    """Assignments of each expert [all experts]."""
    requested: Tensor
    """Assignments of each expert before any was dropped, without those of padding."""
    dropped: Tensor
    """Fraction of dropped assignments, without those of padding, scalar."""

    @staticmethod
    def of(experts: Tensor, count: int, slots: int | None, real: Tensor | None = None) -> Dispatch:
        """Creates the dispatch from the experts of each token.

        Args:
            experts: [n, k].
            count: All experts.
            slots: Capacity of an expert, None for no limit.
            real: False for padding, which no expert takes where there is a limit, [n]; None where there is none.
        """
        flat, numbers = experts.flatten(), torch.arange(count, device=experts.device)
        counted = flat if real is None else experts.masked_fill(~real[:, None], count).flatten()
        # torch.bincount would have the host wait for the largest number.
        requested = (counted.unsqueeze(1) == numbers).sum(0)
        if slots is None:
            counts = requested if real is None else (flat.unsqueeze(1) == numbers).sum(0)
            return Dispatch(flat.argsort(stable=True), counts, requested, torch.zeros((), device=flat.device))
        order = counted.argsort(stable=True)  # padding last
        sorted_experts = counted[order]
        first = requested.cumsum(0) - requested  # [all experts]
        rank_in_expert = torch.arange(len(flat), device=flat.device) - first[sorted_experts.clamp(max=count - 1)]
        taken = rank_in_expert < slots
        if real is not None:
            taken &= sorted_experts < count
        counts = requested.clamp(max=slots)
        dropped = (requested - counts).sum() / requested.sum().clamp(min=1)
        return Dispatch(order[taken], counts, requested, dropped)
