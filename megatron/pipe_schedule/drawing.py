"""Draws a step of a schedule as text: one line a rank, one character a unit of time."""

from __future__ import annotations

from megatron.pipe_schedule.order import BACKWARD, FORWARD, INPUT
from megatron.pipe_schedule.timing import Timeline

LEGEND = "F forward, I and W gradients of activations and weights, small letters: later stages of the rank, . idle"
MOST_COLUMNS, MOST_RANKS = 100, 8
_GAP = " ... "


def drawn(step: Timeline) -> list[str]:
    """Returns the lines of a drawing; of a large schedule the first and last ranks, and the start and the end."""
    unit = min(end - start for rank in step.passes for work, start, end in rank if work.kind == FORWARD)
    ranks = range(len(step.passes))
    shown = list(ranks) if len(ranks) <= MOST_RANKS else [*ranks[: MOST_RANKS // 2], *ranks[-MOST_RANKS // 2 :]]
    width = len(str(ranks[-1]))
    lines = []
    for before, rank in zip([-1, *shown], shown, strict=False):
        if rank != before + 1:
            lines.append("...")
        lines.append(f"rank {rank:>{width}} {_short(_cells(step, rank, unit))}")
    return lines


def _cells(step: Timeline, rank: int, unit: float) -> str:
    cells = ["."] * round(step.end / unit)
    first = step.layout.stages_of(rank)[0]
    for work, start, end in step.passes[rank]:
        size = end - start
        letters = {FORWARD: "F", INPUT: "I"}.get(work.kind, "W")
        for cell in range(round(start / unit), round(end / unit)):
            share = (cell + 0.5) * unit - start
            letter = ("I" if share < size * _inputs_share(step) else "W") if work.kind == BACKWARD else letters
            cells[cell] = letter if work.stage == first else letter.lower()
    return "".join(cells)


def _inputs_share(step: Timeline) -> float:
    """Returns the part of a full backward pass that the gradients of activations take."""
    return step.times.inputs / (step.times.inputs + step.times.weights)


def _short(cells: str) -> str:
    if len(cells) <= MOST_COLUMNS:
        return cells
    half = (MOST_COLUMNS - len(_GAP)) // 2
    return cells[:half] + _GAP + cells[-half:]
