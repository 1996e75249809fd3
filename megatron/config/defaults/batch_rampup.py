"""A batch that grows: `rampup_batch_size` = [first, increment, samples], as Megatron-LM has it.

The batch starts at `first` samples and grows by `increment` in equal stages until `samples` were consumed, then it is
the whole train_batch_size. Its size is a function of the samples consumed, so a resumed run goes on where it was, and
the data keeps its order: a smaller batch is fewer micro batches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ramp:
    """first, increment, full: [samples a step]; samples: over which the batch grows. Without growth first is full."""

    full: int
    first: int
    increment: int = 0
    samples: int = 0

    @staticmethod
    def of(full: int, ramp: tuple[int, ...] | None) -> Ramp:
        """From train_batch_size and rampup_batch_size."""
        return Ramp(full, full) if ramp is None else Ramp(full, *ramp)

    @property
    def stages(self) -> int:
        """How often the batch grows."""
        return (self.full - self.first) // self.increment if self.increment else 0

    def size(self, consumed: int) -> int:
        """Samples of the step that follows on so many consumed samples."""
        if consumed >= self.samples or self.stages == 0:
            return self.full
        return self.first + self.increment * (consumed * self.stages // self.samples)

    def sizes(self) -> list[int]:
        """Every size that occurs, in order."""
        return [self.first + self.increment * stage for stage in range(self.stages)] + [self.full]

    def consumed(self, steps: int) -> int:
        """Samples consumed by so many steps from the start."""
        consumed = 0
        while steps > 0 and consumed < self.samples:
            consumed += self.size(consumed)
            steps -= 1
        return consumed + steps * self.full

    def steps(self, samples: int) -> int:
        """Steps from the start that consume no more than so many samples."""
        consumed = count = 0
        while consumed < self.samples:
            if consumed + self.size(consumed) > samples:
                return count
            consumed += self.size(consumed)
            count += 1
        return count + (samples - consumed) // self.full
