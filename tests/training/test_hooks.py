"""Hooks: which moments of a run they see, in which order, and that a failing step still ends their contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megatron.data.dataset.batch import MicroBatch
from megatron.engine.engine import StepResult
from megatron.errors import RunError
from megatron.metrics.reporter import Reporter
from megatron.metrics.timers import no_wait
from megatron.training.hooks.base import Hook, Hooks
from megatron.training.loop import run_loop
from megatron.training.loop_context import LoopContext
from megatron.training.run_state import RunState
from megatron.training.step_schedule import StepSize
from tests.training.schedules import plain_schedule

LENGTH, SAMPLES = 4, 2


class RecordingHook(Hook):
    """Appends every moment to a list."""

    def __init__(self, moments: list[str], name: str = "") -> None:
        self.moments, self.name = moments, name

    def _add(self, moment: str) -> None:
        self.moments.append(f"{self.name}{moment}")

    @contextmanager
    def _around(self, moment: str) -> Iterator[None]:
        self._add(f"{moment} begins")
        try:
            yield
        finally:
            self._add(f"{moment} ends")

    def on_run_start(self, state: RunState) -> None:
        self._add("on_run_start")

    def before_step(self, iteration: int, size: StepSize) -> None:
        self._add(f"before_step {iteration}")

    def around_step(self, iteration: int, size: StepSize) -> Any:
        return self._around(f"step {iteration}")

    def after_step(self, state: RunState, size: StepSize, result: StepResult) -> None:
        self._add(f"after_step {state.iteration + 1}")

    def metrics(self) -> dict[str, float]:
        self._add("metrics")
        return {f"{self.name}measured": 1.0}

    def before_evaluate(self, state: RunState) -> None:
        self._add(f"before_evaluate {state.iteration}")

    def after_evaluate(self, state: RunState) -> None:
        self._add(f"after_evaluate {state.iteration}")

    def before_save(self, state: RunState) -> None:
        self._add(f"before_save {state.iteration}")

    def around_save(self, state: RunState) -> Any:
        return self._around(f"save {state.iteration}")

    def after_save(self, state: RunState) -> None:
        self._add(f"after_save {state.iteration}")

    def around_data_wait(self, split: str) -> Any:
        return self._around(f"{split} data")

    def on_run_end(self, state: RunState) -> None:
        self._add(f"on_run_end {state.iteration}")


class Data:
    """Endless micro batches."""

    full_pass = None

    def batches(self, consumed_samples: int = 0) -> Iterator[MicroBatch]:
        tokens = torch.zeros(SAMPLES, LENGTH, dtype=torch.long)
        while True:
            yield MicroBatch(tokens, tokens, torch.ones(SAMPLES, LENGTH))


class ConstantEngine:
    """An engine whose loss is 1; the step numbered `fails_at` raises."""

    min_eval_batches = 1

    def __init__(self, fails_at: int | None = None) -> None:
        self.steps, self.fails_at = 0, fails_at

    def prepare(self, micro_batches: int, length: int) -> None:
        pass

    def take_loss_parts(self) -> dict[str, float]:
        return {}

    def train_step(self, batches: Iterator[MicroBatch], learning_rate: float) -> StepResult:
        next(batches)
        self.steps += 1
        if self.steps == self.fails_at:
            raise RunError.of("out of luck")
        return StepResult(torch.ones(()), torch.ones(()), learning_rate, 1.0, skipped=torch.tensor(False))

    def eval_sums(self, batches: Iterator[MicroBatch], count: int) -> tuple[float, float]:
        for _ in range(count):
            next(batches)
        return 1.0, 1.0


class ListReporter(Reporter):
    """Keeps the metrics of training reports."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[dict[str, float]] = []

    def train(self, iteration: int, metrics: Any, *, total_iterations: int) -> None:
        self.reports.append(dict(metrics))


def run(
    hooks: list[Hook],
    *,
    fails_at: int | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    total: int = 2,
    **numbers: int,
) -> ListReporter:
    """Two steps on one process: the second is reported, evaluated and saved, and so is the last of more."""
    reporter = ListReporter()
    usual = {"log_interval": total, "eval_interval": 2, "eval_iters": 1, "save_factor": 2}
    schedule = plain_schedule(total, samples=SAMPLES, length=LENGTH, **{**usual, **numbers})
    engine: Any = ConstantEngine(fails_at)
    lr_schedule: Any = type("Constant", (), {"lr": lambda self, step: 0.1})()
    context = LoopContext(
        engine=engine,
        lr_schedule=lr_schedule,
        train=Data(),
        valid=Data(),
        reporter=reporter,
        stop_requested=stop_requested,
        save=lambda state: None,
        check_saves=no_wait,
        synchronize=no_wait,
        peak_memory=lambda: 0,
        hooks=Hooks(hooks),
    )
    run_loop(schedule, context, RunState())
    return reporter


def step(number: int) -> list[str]:
    return [
        f"before_step {number}",
        f"step {number} begins",
        "train data begins",
        "train data ends",
        f"step {number} ends",
        f"after_step {number}",
    ]


def test_a_hook_sees_every_moment_in_order() -> None:
    moments: list[str] = []
    reporter = run([RecordingHook(moments)])
    assert moments == [
        "on_run_start",
        *step(1),
        "metrics",  # the first step is always reported
        *step(2),
        "metrics",
        "before_save 2",
        "save 2 begins",
        "save 2 ends",
        "after_save 2",
        "before_evaluate 2",
        "validation data begins",
        "validation data ends",
        "after_evaluate 2",
        "on_run_end 2",
    ]
    assert reporter.reports[-1]["measured"] == 1.0


def test_hooks_are_called_in_the_order_of_their_list() -> None:
    moments: list[str] = []
    reporter = run([RecordingHook(moments, "first "), RecordingHook(moments, "second ")])
    assert moments[2:6] == [
        "first before_step 1",
        "second before_step 1",
        "first step 1 begins",
        "second step 1 begins",
    ]
    assert moments[10:12] == ["second step 1 ends", "first step 1 ends"]
    assert {"first measured", "second measured"} <= reporter.reports[0].keys()


def test_contexts_end_when_a_step_fails_and_nothing_else_is_called() -> None:
    moments: list[str] = []
    with pytest.raises(RunError, match="out of luck"):
        run([RecordingHook(moments)], fails_at=1)
    assert moments == ["on_run_start", *step(1)[:-1]]


def test_a_stop_request_during_an_evaluation_skips_after_evaluate() -> None:
    moments: list[str] = []
    run([RecordingHook(moments)], stop_requested=lambda: "before_evaluate 2" in moments)
    assert moments[-3:] == ["after_save 2", "before_evaluate 2", "on_run_end 2"]


def test_a_run_that_its_configuration_ends_saves_before_it_evaluates() -> None:
    moments: list[str] = []
    run([RecordingHook(moments)], total=8, save_factor=100, exit_interval=2)
    order = [moment for moment in moments if moment.startswith(("before_save", "before_evaluate", "on_run_end"))]
    assert order == ["before_save 2", "before_evaluate 2", "on_run_end 2"]


def test_a_stop_between_two_reports_reports_its_steps() -> None:
    moments: list[str] = []
    reporter = run([RecordingHook(moments)], stop_requested=lambda: "after_step 3" in moments, total=8)
    assert [report["consumed_tokens"] for report in reporter.reports] == [SAMPLES * LENGTH, 3 * SAMPLES * LENGTH]
    assert moments[-6:] == ["metrics", "before_save 3", "save 3 begins", "save 3 ends", "after_save 3", "on_run_end 3"]
