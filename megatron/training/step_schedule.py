"""How large each step is: samples (a batch may grow) and tokens of a sequence (a curriculum may lengthen them)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron.config.defaults.batch_rampup import BatchRampup
from megatron.data.dataset.batch import MicroBatch


@dataclass(frozen=True)
class StepSize:
    """One step: samples over all ranks, micro batches of a data-parallel rank, length of a sequence [tokens].

    whole: the length that the data has.
    """

    samples: int
    micro_batches: int
    length: int
    whole: int

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    def of(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro batches, their sequences cut to the length of this step."""
        return batches if self.length == self.whole else (batch.first(self.length) for batch in batches)


@dataclass(frozen=True)
class StepSizes:
    """The sizes of all steps. share: samples of one micro batch over all data-parallel ranks. lengths: by step."""

    ramp: BatchRampup
    share: int
    lengths: Callable[[int], int]
    whole: int

    def of(self, steps: int, consumed_samples: int) -> StepSize:
        """The step that follows on so many steps and samples."""
        samples = self.ramp.size(consumed_samples)
        return StepSize(samples, samples // self.share, self.lengths(steps + 1), self.whole)
