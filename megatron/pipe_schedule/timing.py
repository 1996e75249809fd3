"""When each pass of a schedule runs, if every stage takes the same time and sending takes none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.pipe_schedule.layout import PipeLayout
from megatron.pipe_schedule.order import BACKWARD, FORWARD, INPUT, WEIGHT, Work, order_of


@dataclass(frozen=True)
class PassTimes:
    """Durations of the passes of one micro batch through all layers of a rank; they are shared out over its stages."""

    forward: float = 1.0
    """Forward pass."""
    inputs: float = 1.0
    """Gradients of activations, with the second forward pass of recomputed layers."""
    weights: float = 1.0
    """Gradients of weights."""

    def of(self, kind: str) -> float:
        """Returns the duration of a kind of pass."""
        if kind == FORWARD:
            return self.forward
        return (self.inputs if kind in (INPUT, BACKWARD) else 0) + (self.weights if kind in (WEIGHT, BACKWARD) else 0)


@dataclass(frozen=True)
class Timeline:
    """A step of a schedule in time."""

    layout: PipeLayout
    """The schedule."""
    times: PassTimes
    """Durations of the passes."""
    passes: tuple[tuple[tuple[Work, float, float], ...], ...]
    """Passes of each rank with their start and end."""

    @property
    def end(self) -> float:
        """Time at which the last rank is done."""
        return max(rank[-1][2] for rank in self.passes)

    @property
    def bubble(self) -> float:
        """Fraction of the time of all ranks in which they wait."""
        busy = sum(end - start for rank in self.passes for _, start, end in rank)
        return 1 - busy / (self.end * len(self.passes))


def timeline(layout: PipeLayout, micro_batches: int, times: PassTimes | None = None) -> Timeline:
    """Returns when each pass of a step runs.

    Raises ValueError for a number of micro batches that the schedule does not take.
    """
    times = times or PassTimes()
    orders = order_of(layout, micro_batches)
    done: dict[tuple[str, int, int], float] = {}
    found: list[list[tuple[Work, float, float]]] = [[] for _ in orders]
    while any(len(passes) < len(order) for passes, order in zip(found, orders, strict=True)):
        before = len(done)
        for passes, order in zip(found, orders, strict=True):
            while len(passes) < len(order):
                work = order[len(passes)]
                needed = [done.get(each) for each in _needs(work, layout.stages)]
                if None in needed:
                    break
                start = max([passes[-1][2] if passes else 0.0, *(one for one in needed if one is not None)])
                end = start + times.of(work.kind) / layout.chunks
                passes.append((work, start, end))
                done[_result(work)] = end
        if len(done) == before:
            raise ValueError(f"the passes of {layout.schedule} wait for each other")
    return Timeline(layout, times, tuple(tuple(passes) for passes in found))


def _result(work: Work) -> tuple[str, int, int]:
    return (BACKWARD if work.kind == INPUT else work.kind, work.stage, work.batch)


def _needs(work: Work, stages: int) -> list[tuple[str, int, int]]:
    """Returns the passes that must be done before."""
    if work.kind == FORWARD:
        return [] if work.stage == 0 else [(FORWARD, work.stage - 1, work.batch)]
    if work.kind == WEIGHT:
        return [(BACKWARD, work.stage, work.batch)]
    own = (FORWARD, work.stage, work.batch)
    return [own] if work.stage == stages - 1 else [own, (BACKWARD, work.stage + 1, work.batch)]


def most_in_flight(order: Sequence[Work]) -> Counter[int]:
    """Returns stage -> micro batches whose activations a rank holds at the moment when it holds most.

    Activations are freed by the full backward pass or the WEIGHT pass. order: the passes of the rank.
    """
    split = {(work.stage, work.batch) for work in order if work.kind == WEIGHT}
    live: Counter[int] = Counter()
    most: Counter[int] = Counter()
    count = largest = 0
    for work in order:
        change = 1 if work.kind == FORWARD else 0 if work.kind == INPUT and work[1:] in split else -1
        live[work.stage] += change
        count += change
        if count > largest:
            largest, most = count, live.copy()
    return most


def in_flight(layout: PipeLayout, micro_batches: int) -> list[Counter[int]]:
    """Returns `most_in_flight` of every rank, for a number of micro batches or the next one that the schedule takes."""
    enough = min(micro_batches, 4 * layout.stages)  # more do not change it
    if not layout.takes(enough):
        enough = layout.nearest(enough)[-1]
    return [most_in_flight(order) for order in order_of(layout, enough)]
