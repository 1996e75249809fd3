"""Optimizers of packages that count updates by parameter group: here the count is stored with each parameter.

Checkpoints store state by parameter, and ZeRO 3 steps one partition after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.optim.builder_args import STEP


class CountedSteps:
    """Goes before an optimizer of a package among the base classes."""

    param_groups: list[dict[str, Any]]
    """The optimizer's parameter groups."""
    state: Any
    """Its state, by parameter."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Gives each group the count of its parameters, and the parameters the count after the update."""
        stepped = [
            (group, [parameter for parameter in group["params"] if parameter.grad is not None and parameter.numel()])
            for group in self.param_groups
        ]
        for group, parameters in stepped:
            counts = {int(self.state[parameter].pop(STEP, 0)) for parameter in parameters}
            assert len(counts) <= 1, "parameters that are updated together have been updated equally often"
            group[STEP] = counts.pop() if counts else 0
        loss = super().step(closure)  # type: ignore[misc]
        for group, parameters in stepped:
            for parameter in parameters:
                self.state[parameter][STEP] = group[STEP]
        return loss
