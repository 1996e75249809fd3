"""The order in which each rank of a pipeline computes the micro batches of a step.

Sources: 1F1B and interleaving arXiv:2104.04473, zero bubble arXiv:2401.10241 (ZB-V), DualPipeV the V-shaped half of
DualPipe (arXiv:2412.19437).
"""

from __future__ import annotations

from typing import NamedTuple

from megatron.pipe_schedule.layout import DUALPIPEV, INTERLEAVED, ZERO_BUBBLE, PipeLayout

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"
"""Forward pass; full backward pass; gradients of activations; gradients of weights that INPUT left for later."""


class Work(NamedTuple):
    """A pass of one micro batch through one stage."""

    kind: str
    """FORWARD, BACKWARD, INPUT or WEIGHT."""
    stage: int
    """Number of the stage in the model."""
    batch: int
    """Number of the micro batch in the step."""


def order_of(layout: PipeLayout, micro_batches: int) -> list[list[Work]]:
    """Returns the passes of every rank, in order.

    Raises ValueError for a number of micro batches that the schedule does not take.
    """
    if not layout.takes(micro_batches):
        raise ValueError(f"{layout.schedule} on {layout.ranks} ranks does not take {micro_batches} micro batches")
    if layout.schedule == ZERO_BUBBLE:
        return [_zero_bubble(layout, rank, micro_batches) for rank in range(layout.ranks)]
    if layout.schedule == DUALPIPEV:
        return [_dualpipev(layout, rank, micro_batches) for rank in range(layout.ranks)]
    return [_one_f_one_b(layout, rank, micro_batches) for rank in range(layout.ranks)]


def forward_order(layout: PipeLayout, micro_batches: int) -> list[list[Work]]:
    """Returns the passes of an evaluation: forward only, each micro batch as soon as the one before it."""
    return [
        sorted(
            (Work(FORWARD, stage, batch) for stage in layout.stages_of(rank) for batch in range(micro_batches)),
            key=lambda work: (work.stage + work.batch, work.stage),
        )
        for rank in range(layout.ranks)
    ]


def _one_f_one_b(layout: PipeLayout, rank: int, micro_batches: int) -> list[Work]:
    """One forward pass in turn with one backward pass; with chunks, a group of micro batches passes chunk by chunk."""
    group = micro_batches // max(1, micro_batches // layout.ranks)
    chunks = layout.stages_of(rank)
    if layout.schedule != INTERLEAVED:
        group = micro_batches

    def passes(kind: str, stages: tuple[int, ...]) -> list[Work]:
        starts = range(0, micro_batches, group)
        return [Work(kind, stage, first + one) for first in starts for stage in stages for one in range(group)]

    forward, backward = passes(FORWARD, chunks), passes(BACKWARD, chunks[::-1])
    hops = layout.ranks - 1 - rank
    ahead = (len(chunks) - 1) * group + 2 * hops if layout.schedule == INTERLEAVED else hops
    ahead = min(len(forward), ahead)
    steady = [work for pair in zip(forward[ahead:], backward, strict=False) for work in pair]
    return [*forward[:ahead], *steady, *backward[len(forward) - ahead :]]


class _Passes:
    """Collects the passes of a rank with two stages; the micro batches of each kind and stage follow each other."""

    def __init__(self, stages: tuple[int, ...]) -> None:
        self.found: list[Work] = []
        self._stages = stages
        self._next: dict[tuple[str, int], int] = {}
        self._waiting: list[Work] = []

    def count(self, kind: str, chunk: int) -> int:
        """Returns how many micro batches have had that pass."""
        return self._next.get((kind, chunk), 0)

    def add(self, kind: str, chunk: int) -> None:
        """Adds the next FORWARD, BACKWARD or INPUT pass of a chunk."""
        counted = FORWARD if kind == FORWARD else BACKWARD
        batch = self.count(counted, chunk)
        self._next[counted, chunk] = batch + 1
        self.found.append(Work(kind, self._stages[chunk], batch))
        if kind == INPUT:
            self._waiting.append(Work(WEIGHT, self._stages[chunk], batch))

    def weights(self, chunk: int | None = None) -> bool:
        """Adds the WEIGHT pass that waits longest, of a chunk or of any; False if none waits."""
        for work in self._waiting:
            if chunk is None or work.stage == self._stages[chunk]:
                self._waiting.remove(work)
                self.found.append(work)
                return True
        return False

    def backward(self, chunk: int) -> None:
        """Adds a backward pass in two parts, so that the gradient leaves after the first."""
        self.add(INPUT, chunk)
        self.weights(chunk)


def _zero_bubble(layout: PipeLayout, rank: int, micro_batches: int) -> list[Work]:
    """ZB-V: gradients of weights fill the end of the step."""
    ranks, passes = layout.ranks, _Passes(layout.stages_of(rank))
    count = max(2 * ranks - 1, micro_batches)  # fewer are left out below
    for _ in range(2 * (ranks - rank) - 1):
        passes.add(FORWARD, 0)
    for _ in range(rank):
        passes.add(FORWARD, 1)
        passes.add(FORWARD, 0)
    for _ in range(ranks - rank):
        passes.add(FORWARD, 1)
        passes.backward(1)
    while passes.count(FORWARD, 1) < count:
        if passes.count(FORWARD, 0) < count:
            passes.add(FORWARD, 0)
        passes.backward(0)
        passes.add(FORWARD, 1)
        passes.backward(1)
    for _ in range(rank):
        passes.add(INPUT, 0)
        passes.add(INPUT, 1)
    for _ in range(ranks - rank):
        passes.add(INPUT, 0)
        passes.weights(0)
    for chunk in (1, 0):
        while passes.weights(chunk):
            pass
    return [work for work in passes.found if work.batch < micro_batches]


def _dualpipev(layout: PipeLayout, rank: int, micro_batches: int) -> list[Work]:
    """DualPipeV: forward passes of one chunk in turn with backward passes of the other."""
    ranks, passes = layout.ranks, _Passes(layout.stages_of(rank))
    hops = ranks - 1 - rank
    for _ in range(2 * hops):
        passes.add(FORWARD, 0)
    for _ in range(rank + 1):
        passes.add(FORWARD, 0)
        passes.add(FORWARD, 1)
    for _ in range(hops):
        passes.backward(1)
        passes.add(FORWARD, 1)
    for _ in range(micro_batches - 2 * ranks + rank + 1):
        passes.add(FORWARD, 0)
        passes.add(BACKWARD, 1)
        passes.add(FORWARD, 1)
        passes.add(BACKWARD, 0)
    for _ in range(hops):
        passes.add(BACKWARD, 1)
        passes.add(FORWARD, 1)
        passes.add(BACKWARD, 0)
    for number in range(2 * (rank + 1)):  # the second half leaves gradients of weights for the idle time after it
        passes.add(INPUT if number > rank else BACKWARD, 1 - number % 2)
    for _ in range(hops):
        passes.weights()
        passes.add(INPUT, 0)
    while passes.weights():
        pass
    return passes.found
