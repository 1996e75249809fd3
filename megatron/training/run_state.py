"""The facts of a run that change: how far it has come. Nothing else in a run is mutable."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from megatron.checkpoint.save.saver import Counters


@dataclass
class RunState:
    """Counters of the run, and of this process of it.

    iteration [steps], consumed_samples, consumed_tokens and skipped [steps] go on from a checkpoint; started_at
    (monotonic clock [s]) belongs to this process.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped: int = 0
    started_at: float = field(default_factory=time.monotonic)

    @staticmethod
    def from_counters(counters: Counters) -> RunState:
        """Where a checkpoint left off."""
        return RunState(
            iteration=counters.iteration,
            consumed_samples=counters.consumed_samples,
            consumed_tokens=counters.consumed_tokens,
            skipped=counters.skipped,
        )

    def counters(self) -> Counters:
        """What a checkpoint keeps."""
        return Counters(self.iteration, self.consumed_samples, self.consumed_tokens, self.skipped)

    def advance(self, *, samples: int, tokens: int, skipped: bool) -> None:
        """Counts one step over a global batch of that many samples and tokens."""
        self.iteration += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens
        self.skipped += int(skipped)

    @property
    def updates(self) -> int:
        """Steps that changed the weights; the learning-rate schedule counts these."""
        return self.iteration - self.skipped

    def elapsed(self) -> float:
        """How long this process has been at it [s]."""
        return time.monotonic() - self.started_at
