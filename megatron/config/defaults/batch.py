"""Batch arithmetic: train_batch_size = micro batch x gradient accumulation x data parallel size."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.errors import ConfigError, ConfigIssue

TOTAL, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@dataclass(frozen=True)
class Batch:
    """The three sizes, which satisfy the equation. total [samples], micro [samples], steps [micro batches]."""

    total: int
    micro: int
    steps: int


def equation(total: int | None, micro: int | None, steps: int | None, data_parallel: int) -> str:
    """The equation with its numbers; a question mark stands for what is sought."""
    shown = [("?" if value is None else str(value)) for value in (total, micro, steps)]
    return f"{TOTAL} = {MICRO} x {STEPS} x data parallel size: {shown[0]} = {shown[1]} x {shown[2]} x {data_parallel}"


def size_issues(total: int | None, micro: int | None, steps: int | None) -> list[ConfigIssue]:
    """The sizes that are less than one."""
    return [
        ConfigIssue("a size must be at least 1", key=name, value=value)
        for name, value in ((TOTAL, total), (MICRO, micro), (STEPS, steps))
        if value is not None and value < 1
    ]


def derive_batch(total: int | None, micro: int | None, steps: int | None, data_parallel: int) -> Batch:
    """Fills in what is missing. Raises ConfigError, with the equation and its numbers, where it cannot hold."""
    told = equation(total, micro, steps, data_parallel)
    ConfigError.raise_any(size_issues(total, micro, steps))
    if total is None:
        if micro is None:
            raise ConfigError.of(f"neither {TOTAL} nor {MICRO} is given", key=MICRO, hint=f"give one of them ({told})")
        steps = steps or 1
        return Batch(micro * steps * data_parallel, micro, steps)
    if micro is None:
        steps = steps or 1
        micro = _divide(total, steps * data_parallel, told)
    elif steps is None:
        steps = _divide(total, micro * data_parallel, told)
    if total != micro * steps * data_parallel:
        raise ConfigError.of(
            f"{told}, but the right side is {micro * steps * data_parallel}",
            key=TOTAL,
            value=total,
            hint="leave one of the three out, or change the world size",
        )
    return Batch(total, micro, steps)


def _divide(total: int, by: int, told: str) -> int:
    if total % by:
        below, above = total // by * by, (total // by + 1) * by
        near = f"{above}" if below == 0 else f"{below} or {above}"
        raise ConfigError.of(
            f"{told} has no whole solution, since {by} does not divide {total}",
            key=TOTAL,
            value=total,
            hint=f"the nearest sizes that work are {near}",
        )
    return total // by
