"""Schedules of a training loop for tests: a constant batch and length, and no event that a test does not ask for."""

from __future__ import annotations

from typing import Any

from megatron.config.derived.batch_rampup import BatchRampup
from megatron.training.loop_context import TrainSchedule
from megatron.training.step_schedule import StepSizes


def plain_schedule(total: int, *, samples: int, length: int, micro_batches: int = 1, **events: Any) -> TrainSchedule:
    """A schedule of that many steps.

    Args:
        total: Number of steps.
        samples: Samples a step.
        length: Tokens of a sample.
        micro_batches: Micro batches a step.
        events: Fields of the schedule that differ from those here.
    """
    fields: dict[str, Any] = {
        "log_interval": 100,
        "eval_interval": 1000,
        "eval_iters": 0,
        "exit_interval": None,
        "exit_minutes": None,
        "save_scale": "linear",
        "save_factor": None,
        "save_extra": (),
        **events,
    }
    return TrainSchedule(
        total=total,
        samples=samples,
        micro_batches=micro_batches,
        sizes=StepSizes(BatchRampup.of(samples, None), samples // micro_batches, lambda step: length, length),
        flops=lambda length: 1.0,
        peak_flops=0.0,
        **fields,
    )
