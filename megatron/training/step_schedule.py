"""Size of each step: samples (batch size ramp-up) and sequence length (curriculum)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron.config.derived.batch_rampup import BatchRampup
from megatron.data.dataset.batch import MicroBatch


@dataclass(frozen=True)
class StepSize:
    """Size of one step."""

    samples: int
    """Samples over all ranks."""
    micro_batches: int
    """Micro batches of a data-parallel rank."""
    length: int
    """Sequence length [tokens]."""
    max_length: int
    """Sequence length of the data [tokens]."""
    rows: int = 1
    """Sequences of a sample: the answers of a question."""

    @property
    def tokens(self) -> int:
        return self.samples * self.rows * self.length

    def truncate(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Truncates the sequences of the micro batches to the length of this step."""
        return batches if self.length == self.max_length else (batch.first(self.length) for batch in batches)


@dataclass(frozen=True)
class StepSizes:
    """Sizes of all steps."""

    ramp: BatchRampup
    """Batch size by consumed samples."""
    samples_per_micro_batch: int
    """Samples of one micro batch over all data-parallel ranks."""
    lengths: Callable[[int], int]
    """Iteration -> sequence length [tokens]."""
    max_length: int
    """Sequence length of the data [tokens]."""
    rows: int = 1
    """Sequences of a sample."""

    def at(self, steps: int, consumed_samples: int) -> StepSize:
        """Returns the size of the step after so many steps and samples."""
        samples = self.ramp.size(consumed_samples)
        length = self.lengths(steps + 1)
        return StepSize(samples, samples // self.samples_per_micro_batch, length, self.max_length, self.rows)
