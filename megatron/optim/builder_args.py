"""Arguments of optimizer builders.

A builder is a function `build(groups, args)` that the registry's OPTIMIZERS names; it returns a torch optimizer over
the groups. Each group has its own weight decay. The learning rate is set before every step.

An optimizer that counts updates stores the count under "step" in the state of each parameter, where checkpoints look
for it; `mark_int_step` marks one that stores a Python integer there instead of a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from megatron.distributed.mesh import Topology

Groups = list[dict[str, Any]]
STEP = "step"


@dataclass(frozen=True)
class OptimizerArgs:
    """Settings of an optimizer."""

    lr: float
    """Peak learning rate."""
    topology: Topology
    """Layout of the ranks."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys under optimizer.params."""
    flat_partitions: bool = False
    """True if the optimizer gets flat partitions of the parameters from ZeRO instead of the parameters."""
    kernel: Any = None
    """Implementation of the operation that the optimizer's registry entry names; None for its own code."""

    def number(self, name: str, default: float) -> float:
        """Returns a numeric setting."""
        return float(self.settings.get(name, default))

    def flag(self, name: str, default: bool) -> bool:
        """Returns a boolean setting."""
        return bool(self.settings.get(name, default))

    def betas(self, default: tuple[float, float]) -> tuple[float, float]:
        """Returns the decay rates of the first and the second moment."""
        first, second = self.settings.get("betas", default)
        return float(first), float(second)


@runtime_checkable
class AveragingOptimizer(Protocol):
    """An optimizer that averages its iterates, such as schedule-free AdamW."""

    def average(self, parameter: torch.Tensor) -> torch.Tensor:
        """Returns the average of a parameter."""

    def numbers(self) -> dict[str, float]:
        """Returns what the average depends on beside the state of parameters, for a checkpoint."""

    def load_numbers(self, stored: Mapping[str, float]) -> None:
        """Restores `numbers`, once the state of parameters is restored."""


def mark_int_step(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Marks the optimizer as storing `step` as int, and returns it."""
    optimizer.neox_integer_steps = True  # type: ignore[attr-defined]
    return optimizer


def step_count(optimizer: torch.optim.Optimizer, count: int, device: torch.device) -> int | torch.Tensor:
    """Returns a number of updates in the form in which the optimizer stores it."""
    if getattr(optimizer, "neox_integer_steps", False):
        return count
    return torch.tensor(float(count), device=device)
