"""Finds slow ranks: the pace of every rank at every report."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from megatron.health.straggler import StragglerMonitor
from megatron.training.hooks.base import Hook
from megatron.training.step_schedule import StepSize


class StragglerHook(Hook):
    """Times steps and waits for training data, and compares ranks at every report."""

    def __init__(self, monitor: StragglerMonitor) -> None:
        self._monitor = monitor

    def around_step(self, iteration: int, size: StepSize) -> AbstractContextManager[None]:
        return self._monitor.recording(iteration)

    def around_data_wait(self, split: str) -> AbstractContextManager[None]:
        return self._monitor.waiting() if split == "train" else nullcontext()

    def metrics(self) -> dict[str, float]:
        return self._monitor.measure()
