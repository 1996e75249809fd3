"""What every sink is.

A sink is a class with a classmethod `open(observe, start_iteration)`. `observe` is the configuration's section of that
name, from which the sink reads its own keys; `start_iteration` is the iteration [steps] that the run continues after, 0
for a fresh run. To add one: a new file here and one line in the registry's SINKS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self


class Observe(Protocol):
    """The keys of the configuration's `observe` section that this room reads."""

    @property
    def log_dir(self) -> str | None: ...

    @property
    def tensorboard_dir(self) -> str | None: ...


class Sink(Protocol):
    """Takes metric records, in the order of the run."""

    @classmethod
    def open(cls, observe: Observe, start_iteration: int) -> Self:
        """Starts the sink. Raises ConfigError when an optional package or a needed key is missing."""
        ...

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Stores one record. May raise OSError, which the reporter turns into one warning."""
        ...

    def close(self) -> None:
        """Writes what is still buffered."""
        ...
