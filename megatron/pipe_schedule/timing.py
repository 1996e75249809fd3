"""When each pass of a schedule runs, if every stage takes the same time and sending takes none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.pipe_schedule.layout import PipeLayout
from megatron.pipe_schedule.order import BACKWARD, FORWARD, INPUT, WEIGHT, Work, order_of

WAITING = float("inf")
"""Time of what has not arrived."""


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
    last = layout.stages - 1
    durations = {kind: times.of(kind) / layout.chunks for kind in (FORWARD, BACKWARD, INPUT, WEIGHT)}
    arrived = [[0.0] * micro_batches if stage == 0 else [WAITING] * micro_batches for stage in range(layout.stages)]
    returned = [[0.0] * micro_batches if stage == last else [WAITING] * micro_batches for stage in range(layout.stages)]
    found: list[list[tuple[Work, float, float]]] = [[] for _ in orders]
    now = [0.0] * len(orders)
    progress = True
    while progress:
        progress = False
        for rank, order in enumerate(orders):
            passes = found[rank]
            while len(passes) < len(order):
                work = kind, stage, batch = order[len(passes)]
                source = arrived if kind == FORWARD else returned
                start = max(now[rank], source[stage][batch])
                if start == WAITING:
                    break
                now[rank] = end = start + durations[kind]
                passes.append((work, start, end))
                progress = True
                if kind == FORWARD and stage < last:
                    arrived[stage + 1][batch] = end
                elif kind in (BACKWARD, INPUT) and stage > 0:
                    returned[stage - 1][batch] = end
    if any(len(passes) < len(order) for passes, order in zip(found, orders, strict=True)):
        raise ValueError(f"the passes of {layout.schedule} wait for each other")
    return Timeline(layout, times, tuple(tuple(passes) for passes in found))


def step_bubble(layout: PipeLayout, micro_batches: int, times: PassTimes | None = None) -> tuple[Timeline, float]:
    """Returns the timeline of a step of at most a few rounds of micro batches, and the bubble of the full step.

    Further micro batches take the time of their passes and no more.

    Args:
        layout: the schedule.
        micro_batches: micro batches of a step; where the schedule does not take them, the next number.
        times: durations of the passes.
    """
    times = times or PassTimes()
    step = timeline(layout, _enough(layout, micro_batches), times)
    busy = times.forward + times.inputs + times.weights
    shown = sum(work.kind == FORWARD and work.stage == 0 for work, _, _ in step.passes[0])
    count = max(shown, micro_batches)
    return step, 1 - busy * count / (step.end + busy * (count - shown))


def _enough(layout: PipeLayout, micro_batches: int) -> int:
    """Returns the micro batches that fill the pipeline for some time, at most those of the step."""
    enough = min(micro_batches, 4 * layout.ranks)
    return enough if layout.takes(enough) else layout.nearest(enough)[-1]


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
    return [most_in_flight(order) for order in order_of(layout, _enough(layout, micro_batches))]
