"""Which part of a pipelined model each rank holds, and which numbers of micro batches a schedule takes.

The layers are cut into ranks x chunks parts, the stages. A schedule that interleaves gives rank r the stages r, r + p,
r + 2p, ..., of p ranks (arXiv:2104.04473, section 2.2); one that turns back gives it r and 2p - 1 - r, so that the
first and the last stage are on rank 0 (arXiv:2401.10241, section 6).
"""

from __future__ import annotations

from dataclasses import dataclass

ONE_F_ONE_B = "1f1b"
INTERLEAVED = "interleaved"
ZERO_BUBBLE = "zero_bubble"
DUALPIPEV = "dualpipev"
TURNING = frozenset({ZERO_BUBBLE, DUALPIPEV})
"""Schedules whose stages turn back at the last rank."""
SPLIT = TURNING
"""Schedules that compute some gradients of weights apart from those of activations."""


@dataclass(frozen=True)
class PipeLayout:
    """A schedule on a number of ranks."""

    schedule: str
    """`1f1b`, `interleaved`, `zero_bubble` or `dualpipev`."""
    ranks: int
    """Pipeline ranks."""
    chunks: int = 1
    """Stages of a rank."""

    @property
    def stages(self) -> int:
        """Stages of the model."""
        return self.ranks * self.chunks

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Returns the stages of a rank, in order."""
        if self.schedule in TURNING:
            return (rank, self.stages - 1 - rank)
        return tuple(rank + chunk * self.ranks for chunk in range(self.chunks))

    def rank_of(self, stage: int) -> int:
        """Returns the rank that holds a stage."""
        if self.schedule in TURNING:
            return min(stage, self.stages - 1 - stage)
        return stage % self.ranks

    def takes(self, micro_batches: int) -> bool:
        """Returns whether a step may have so many micro batches."""
        if micro_batches < 1:
            return False
        if self.schedule == INTERLEAVED:
            return micro_batches % max(1, micro_batches // self.ranks) == 0
        return micro_batches >= self.stages if self.schedule == DUALPIPEV else True

    def nearest(self, micro_batches: int) -> tuple[int, ...]:
        """Returns the nearest numbers of micro batches that a step may have, below (if any) and above."""
        below = [count for count in range(micro_batches - 1, 0, -1) if self.takes(count)][:1]
        above = micro_batches + 1
        while not self.takes(above):
            above += 1
        return (*below, above)
