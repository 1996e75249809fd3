"""Batch arithmetic: train_batch_size = micro batch x gradient accumulation x data parallel size."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.errors import ConfigError, ConfigIssue

TOTAL, MICRO, ACCUMULATION_STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@dataclass(frozen=True)
class BatchSizes:
    """Batch sizes that satisfy the equation."""

    total: int
    """train_batch_size [samples]."""
    micro: int
    """train_micro_batch_size_per_gpu [samples]."""
    steps: int
    """gradient_accumulation_steps [micro batches]."""


def equation(total: int | None, micro: int | None, steps: int | None, data_parallel: int) -> str:
    """Formats the equation with its numbers, with a question mark for unknown ones.

    Args:
        total: train_batch_size.
        micro: train_micro_batch_size_per_gpu.
        steps: gradient_accumulation_steps.
        data_parallel: data parallel size.
    """
    shown = [("?" if value is None else str(value)) for value in (total, micro, steps)]
    names = f"{TOTAL} = {MICRO} x {ACCUMULATION_STEPS} x data parallel size"
    return f"{names}: {shown[0]} = {shown[1]} x {shown[2]} x {data_parallel}"


def size_issues(total: int | None, micro: int | None, steps: int | None) -> list[ConfigIssue]:
    """Returns the issues of sizes below one."""
    return [
        ConfigIssue("a size must be at least 1", key=name, value=value)
        for name, value in ((TOTAL, total), (MICRO, micro), (ACCUMULATION_STEPS, steps))
        if value is not None and value < 1
    ]


def derive_batch(total: int | None, micro: int | None, steps: int | None, data_parallel: int) -> BatchSizes:
    """Computes the missing sizes. Raises ConfigError, with the equation, when there is no solution.

    Args:
        total: train_batch_size, if given.
        micro: train_micro_batch_size_per_gpu, if given.
        steps: gradient_accumulation_steps, if given.
        data_parallel: data parallel size.
    """
    equation_text = equation(total, micro, steps, data_parallel)
    ConfigError.raise_any(size_issues(total, micro, steps))
    if total is None:
        if micro is None:
            raise ConfigError.of(
                f"neither {TOTAL} nor {MICRO} is given", key=MICRO, hint=f"give one of them ({equation_text})"
            )
        steps = steps or 1
        return BatchSizes(micro * steps * data_parallel, micro, steps)
    if micro is None:
        steps = steps or 1
        micro = _divide(total, steps * data_parallel, equation_text)
    elif steps is None:
        steps = _divide(total, micro * data_parallel, equation_text)
    if total != micro * steps * data_parallel:
        raise ConfigError.of(
            f"{equation_text}, but the right side is {micro * steps * data_parallel}",
            key=TOTAL,
            value=total,
            hint="leave one of the three out, or change the world size",
        )
    return BatchSizes(total, micro, steps)


def _divide(total: int, by: int, equation_text: str) -> int:
    if total % by:
        below, above = total // by * by, (total // by + 1) * by
        near = f"{above}" if below == 0 else f"{below} or {above}"
        raise ConfigError.of(
            f"{equation_text} has no whole solution, since {by} does not divide {total}",
            key=TOTAL,
            value=total,
            hint=f"the nearest sizes that work are {near}",
        )
    return total // by
