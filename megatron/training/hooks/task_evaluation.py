"""Evaluates tasks during training, after each evaluation on the validation split."""

from __future__ import annotations

from collections.abc import Callable

from megatron.health.heartbeat import TASKS
from megatron.health.watchdog import Watchdog
from megatron.metrics.reporter import Reporter
from megatron.training.hooks.base import Hook
from megatron.training.run_state import RunState


class TaskEvaluationHook(Hook):
    """Evaluates the model on tasks and reports their metrics. Collective."""

    def __init__(self, evaluate: Callable[[], dict[str, float] | None], reporter: Reporter, watchdog: Watchdog) -> None:
        """Creates the hook.

        Args:
            evaluate: returns metrics by name, None when a stop was requested meanwhile.
            reporter: receives the metrics.
            watchdog: is informed of the activity.
        """
        self._evaluate, self._reporter, self._watchdog = evaluate, reporter, watchdog

    def after_evaluate(self, state: RunState) -> bool:
        with self._watchdog.activity(TASKS):
            metrics = self._evaluate()
        if metrics:
            self._reporter.evaluation(state.iteration, "eval", metrics)
        return metrics is not None
