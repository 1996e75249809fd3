"""Predicates for log, evaluation, save and exit intervals. Iterations count from 1."""

from __future__ import annotations

from collections.abc import Sequence


def every(iteration: int, interval: int | None) -> bool:
    """Returns whether the iteration is a multiple of an interval [steps]; false without an interval."""
    return bool(interval) and iteration > 0 and iteration % (interval or 1) == 0


def save_due(iteration: int, *, scale: str, factor: float | None, extra: Sequence[int]) -> bool:
    """Returns whether a checkpoint is due after the iteration.

    Args:
        iteration: iteration that was just finished.
        scale: "linear" saves at every multiple of factor; "log" at every power of factor (1, factor, factor^2, ...,
            rounded down to integers).
        factor: see scale; None saves at no interval.
        extra: further iterations.
    """
    if iteration in extra:
        return True
    if not factor or iteration == 0:
        return False
    if scale == "log":
        return iteration in powers(factor, iteration)
    return every(iteration, int(factor))


def powers(factor: float, limit: int) -> set[int]:
    """Returns 1, factor, factor^2, ... up to the limit, rounded down. factor must be above 1."""
    found = set()
    value = 1.0
    while value <= limit:
        found.add(int(value))
        value *= factor
    return found


def exit_due(
    iteration: int, *, interval: int | None, elapsed_seconds: float, duration_minutes: float | None
) -> str | None:
    """Returns the reason to save and exit after the iteration, or None.

    Args:
        iteration: iteration that was just finished.
        interval: `exit_interval` [steps].
        elapsed_seconds: time that this process has run [s].
        duration_minutes: `exit_duration` [minutes].
    """
    if every(iteration, interval):
        return f"exit_interval: iteration {iteration}"
    if duration_minutes is not None and elapsed_seconds >= 60.0 * duration_minutes:
        return f"exit_duration: {elapsed_seconds / 60:.1f} minutes"
    return None
