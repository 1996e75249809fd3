"""Which activity a rank's heartbeat names in a run, so that a rank that hangs anywhere in the loop is reported."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from megatron.health.heartbeat import UNLIMITED
from megatron.training.hooks.activity import ActivityHook
from tests.end_to_end.runs import BASE, run_rank
from tests.multi_rank import run_distributed


class Observed(ActivityHook):
    """Writes down the activity at some moments."""

    seen: ClassVar[dict[str, str]] = {}

    def _see(self, moment: str) -> None:
        self.seen[moment] = self._watchdog._heartbeat.current().activity

    def before_step(self, iteration, size):
        self._see("before a step")

    def after_step(self, state, size, result):
        self._see("in a step")

    def before_evaluate(self, state):
        self._see("before an evaluation")

    def on_run_end(self, state):
        self._see("at the end")


def activities(rank: int, world_size: int, settings: dict) -> dict[str, str]:
    from megatron.training import trainer

    trainer.ActivityHook = Observed
    run_rank(rank, world_size, settings)
    return Observed.seen


def test_a_hang_between_two_steps_has_a_limit_too(dataset: str, tmp_path: Path) -> None:
    settings = {**BASE, "data_path": dataset, "train_iters": 2, "eval_interval": 1, "log_dir": str(tmp_path)}
    (seen,) = run_distributed(activities, 1, settings)
    assert len(seen) == 4
    assert set(seen.values()) <= {"training", "between two steps"} and not set(seen.values()) & UNLIMITED
    assert seen["before an evaluation"] == seen["at the end"] == "between two steps"
