"""What an optimizer is built from.

A builder is a function `build(groups, request)` that the registry's OPTIMIZERS names; it returns a torch optimizer over
the groups. Each group names its own weight decay. The rate is replaced before every step.

An optimizer that counts updates keeps the count under "step" in the state of each parameter, so that checkpoints find
it; `count_in_integers` says that it wants a Python integer there and no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron.distributed.mesh import Topology

Groups = list[dict[str, Any]]
STEP = "step"


@dataclass(frozen=True)
class Request:
    """lr: the peak rate. topology: where the shards of a tensor are. settings: what is under optimizer.params.

    pieces: DeepSpeed hands the optimizer flat pieces of the parameters (ZeRO), and not the parameters themselves.
    """

    lr: float
    topology: Topology
    settings: Mapping[str, Any] = field(default_factory=dict)
    pieces: bool = False

    def number(self, name: str, default: float) -> float:
        """A number among the settings."""
        return float(self.settings.get(name, default))

    def flag(self, name: str, default: bool) -> bool:
        """A switch among the settings."""
        return bool(self.settings.get(name, default))

    def betas(self, default: tuple[float, float]) -> tuple[float, float]:
        """Decay rates of the first and the second moment."""
        first, second = self.settings.get("betas", default)
        return float(first), float(second)


def count_in_integers(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer, marked: it counts its steps in Python integers."""
    optimizer.neox_integer_steps = True  # type: ignore[attr-defined]
    return optimizer


def step_count(optimizer: torch.optim.Optimizer, count: int, device: torch.device) -> int | torch.Tensor:
    """A number of updates as the optimizer keeps it."""
    if getattr(optimizer, "neox_integer_steps", False):
        return count
    return torch.tensor(float(count), device=device)
