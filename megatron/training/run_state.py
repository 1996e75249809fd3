"""Mutable progress of the run. Nothing else in a run is mutable."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from megatron.checkpoint.save.saver import Counters


@dataclass
class RunState:
    """Counters of the run, and of this process of it."""

    iteration: int = 0
    """Steps, continued from a checkpoint."""
    consumed_samples: int = 0
    """Samples, continued from a checkpoint."""
    consumed_tokens: int = 0
    """Tokens, continued from a checkpoint."""
    skipped: int = 0
    """Steps without an update, continued from a checkpoint."""
    started_at: float = field(default_factory=time.monotonic)
    """Start of this process, on the monotonic clock [s]."""

    @staticmethod
    def from_counters(counters: Counters) -> RunState:
        """Returns the state stored in a checkpoint."""
        return RunState(
            iteration=counters.iteration,
            consumed_samples=counters.consumed_samples,
            consumed_tokens=counters.consumed_tokens,
            skipped=counters.skipped,
        )

    def counters(self) -> Counters:
        """Returns the counters for a checkpoint."""
        return Counters(self.iteration, self.consumed_samples, self.consumed_tokens, self.skipped)

    def advance(self, *, samples: int, tokens: int) -> None:
        """Counts one step over a global batch of that many samples and tokens.

        Whether its update was skipped is counted once the host knows.
        """
        self.iteration += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens

    @property
    def updates(self) -> int:
        """Steps that changed the weights; the learning-rate schedule counts these."""
        return self.iteration - self.skipped

    def elapsed(self) -> float:
        """Returns the time that this process has run [s]."""
        return time.monotonic() - self.started_at
