"""When things happen: pure predicates over the iteration just finished, which counts from 1."""

from __future__ import annotations

from collections.abc import Sequence


def every(iteration: int, interval: int | None) -> bool:
    """Whether the iteration is a multiple of an interval [steps]; never, when there is none."""
    return bool(interval) and iteration > 0 and iteration % (interval or 1) == 0


def save_due(iteration: int, *, scale: str, factor: float | None, extra: Sequence[int]) -> bool:
    """Whether a checkpoint is due after the iteration.

    scale "linear": at every multiple of factor; "log": at every power of factor (1, factor, factor^2, ..., rounded to
    whole steps). extra: further iterations.
    """
    if iteration in extra:
        return True
    if not factor or iteration == 0:
        return False
    if scale == "log":
        return iteration in powers(factor, iteration)
    return every(iteration, int(factor))


def powers(factor: float, limit: int) -> set[int]:
    """1, factor, factor^2, ... up to the limit, rounded down. factor must be above 1."""
    found = set()
    value = 1.0
    while value <= limit:
        found.add(int(value))
        value *= factor
    return found


def exit_due(
    iteration: int, *, interval: int | None, elapsed_seconds: float, duration_minutes: float | None
) -> str | None:
    """Why the run should save and leave after the iteration, or None.

    interval: `exit_interval` [steps]. duration_minutes: `exit_duration` [minutes] against the time this process ran.
    """
    if every(iteration, interval):
        return f"exit_interval: iteration {iteration}"
    if duration_minutes is not None and elapsed_seconds >= 60.0 * duration_minutes:
        return f"exit_duration: {elapsed_seconds / 60:.1f} minutes"
    return None
