"""Batch size ramp-up: `rampup_batch_size` = [first, increment, samples], as in Megatron-LM.

The batch starts at `first` samples and grows by `increment` in equal stages until `samples` were consumed; then it is
train_batch_size. Its size is a function of the consumed samples, so a resumed run continues the ramp-up. The order of
the data does not change: a smaller batch is fewer micro batches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchRampup:
    """Batch size as a function of consumed samples."""

    full: int
    """Final batch size [samples]."""
    first: int
    """First batch size [samples]; equal to `full` without ramp-up."""
    increment: int = 0
    """Growth of each stage [samples]."""
    samples: int = 0
    """Length of the ramp-up [samples]."""

    @staticmethod
    def of(full: int, ramp: tuple[int, ...] | None) -> BatchRampup:
        """Builds the ramp-up from train_batch_size and rampup_batch_size."""
        return BatchRampup(full, full) if ramp is None else BatchRampup(full, *ramp)

    @property
    def stages(self) -> int:
        """Number of times that the batch grows."""
        return (self.full - self.first) // self.increment if self.increment else 0

    def size(self, consumed: int) -> int:
        """Returns the batch size of the next step after `consumed` samples."""
        if consumed >= self.samples or self.stages == 0:
            return self.full
        return self.first + self.increment * (consumed * self.stages // self.samples)

    def sizes(self) -> list[int]:
        """Returns every batch size, in order."""
        return [self.first + self.increment * stage for stage in range(self.stages)] + [self.full]

    def consumed(self, steps: int, start: int = 0) -> int:
        """Returns the samples consumed after `steps` more steps, from `start` consumed samples on."""
        consumed = start
        while steps > 0 and consumed < self.samples:
            consumed += self.size(consumed)
            steps -= 1
        return consumed + steps * self.full

    def steps(self, samples: int, start: int = 0) -> int:
        """Returns the number of steps that fit into `samples`, from `start` consumed samples on."""
        consumed, count = start, 0
        while consumed < self.samples:
            if consumed + self.size(consumed) > samples:
                return count
            consumed += self.size(consumed)
            count += 1
        return count + max(samples - consumed, 0) // self.full
