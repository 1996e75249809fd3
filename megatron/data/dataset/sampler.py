"""Which samples a data-parallel rank takes: consecutive numbers, so that a run can start anywhere at once.

A global micro-batch is micro_batch * data_size consecutive samples; rank r takes the r-th slice of micro_batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.errors import RunError


@dataclass(frozen=True)
class BatchSampler:
    """The share of one rank."""

    total: int
    """Samples in the data set."""
    micro_batch: int
    """Samples a rank takes at once."""
    data_rank: int
    """Its place among the data-parallel ranks."""
    data_size: int
    """Its place among the data-parallel ranks."""

    def batches(self, consumed_samples: int) -> Iterator[range]:
        """The sample numbers of each micro-batch after so many samples were consumed by all ranks together.

        Samples at the end that do not fill a global micro-batch are left out. Raises RunError when more samples were
        consumed than there are.
        """
        if not 0 <= consumed_samples <= self.total:
            raise RunError.of(
                f"the run is at sample {consumed_samples}, and the data set was built for {self.total}",
                hint="continue with the data, seed and number of iterations that the run was started with",
            )
        step = self.micro_batch * self.data_size
        mine = self.data_rank * self.micro_batch
        starts = range(consumed_samples + mine, self.total - step + 1 + mine, step)
        return (range(first, first + self.micro_batch) for first in starts)
