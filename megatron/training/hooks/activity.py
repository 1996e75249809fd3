"""Reports to the watchdog which part of the loop is under way, and in which iteration."""

from __future__ import annotations

from contextlib import AbstractContextManager

from megatron.health.heartbeat import SAVING
from megatron.health.watchdog import Watchdog
from megatron.training.hooks.base import Hook
from megatron.training.run_state import RunState
from megatron.training.step_schedule import StepSize


class ActivityHook(Hook):
    """Sets the activity of this rank's heartbeat: training, reading data, saving."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def around_step(self, iteration: int, size: StepSize) -> AbstractContextManager[None]:
        return self._watchdog.activity("training", iteration)

    def around_data_wait(self, split: str) -> AbstractContextManager[None]:
        return self._watchdog.activity("reading data")

    def around_save(self, state: RunState) -> AbstractContextManager[None]:
        return self._watchdog.activity(SAVING)
