"""Interface of metrics sinks.

A sink is a class with a classmethod `open(observe, start)`. `observe` is the configuration's section of that name, from
which the sink reads its own keys. To add one: a new file here and one entry in the registry's SINKS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self


class Observe(Protocol):
    """Keys of the configuration's `observe` section that sinks read."""

    @property
    def sinks(self) -> tuple[str, ...] | None: ...

    @property
    def log_dir(self) -> str | None: ...

    @property
    def tensorboard_dir(self) -> str | None: ...

    @property
    def use_wandb(self) -> bool | None: ...

    @property
    def wandb_group(self) -> str | None: ...

    @property
    def wandb_run_name(self) -> str | None: ...

    @property
    def wandb_team(self) -> str | None: ...

    @property
    def wandb_project(self) -> str: ...

    @property
    def wandb_host(self) -> str: ...

    @property
    def wandb_init_all_ranks(self) -> bool: ...

    @property
    def use_comet(self) -> bool | None: ...

    @property
    def comet_workspace(self) -> str | None: ...

    @property
    def comet_project(self) -> str | None: ...

    @property
    def comet_experiment_name(self) -> str | None: ...

    @property
    def comet_tags(self) -> tuple[str, ...] | None: ...

    @property
    def comet_others(self) -> dict[str, Any] | None: ...


@dataclass(frozen=True)
class Start:
    """State of the run when a sink opens."""

    iteration: int = 0
    """Iteration after which the run continues; 0 for a fresh run [steps]."""
    rank: int = 0
    """Rank of this process."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Key -> value of the full configuration, for services that show it."""


class Sink(Protocol):
    """Receives metric records in order."""

    @classmethod
    def open(cls, observe: Observe, start: Start) -> Self:
        """Starts the sink. Raises ConfigError when an optional package or a needed key is missing."""
        ...

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Stores one record. May raise OSError, which the reporter turns into one warning."""
        ...

    def close(self) -> None:
        """Writes buffered records."""
        ...
