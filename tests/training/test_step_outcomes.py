"""Steps whose values the host reads one step later, as on a GPU: what the guard sees and when, and what is saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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
from megatron.training.loss_guard import LossGuard
from megatron.training.run_state import RunState
from megatron.training.step_outcomes import StepOutcome
from megatron.training.step_schedule import StepSize
from tests.multi_rank import run_distributed
from tests.training.schedules import plain_schedule

SAMPLES, LENGTH, NAN = 2, 4, float("nan")


class ScriptedEngine:
    """An engine whose losses are given; a step without a number is not applied."""

    min_eval_batches = 1

    def __init__(self, losses: list[float]) -> None:
        self.losses, self.evaluated = losses, 0
        self.rates: list[float] = []

    def prepare(self, micro_batches: int, length: int) -> None:
        pass

    def train_step(self, batches: Iterator[MicroBatch], learning_rate: float) -> StepResult:
        next(batches)
        loss = torch.tensor(self.losses[len(self.rates)])
        self.rates.append(learning_rate)
        return StepResult(loss, loss, learning_rate, 1.0, ~loss.isfinite())

    def eval_sums(self, batches: Iterator[MicroBatch], count: int) -> tuple[float, float]:
        self.evaluated = len(self.rates)
        return 1.0, 1.0


class FixedData:
    """Endless micro batches."""

    full_pass = None

    def batches(self, consumed_samples: int = 0) -> Iterator[MicroBatch]:
        tokens = torch.zeros(SAMPLES, LENGTH, dtype=torch.long)
        while True:
            yield MicroBatch(tokens, tokens, torch.ones(SAMPLES, LENGTH))


class Locating:
    """Takes the place of the locator; says which samples it was asked for."""

    def locate_nonfinite(self, consumed: int, size: StepSize) -> str:
        return f"samples from {consumed}"


class Seen(Hook):
    """Notes which steps were issued when an outcome came."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.issued: dict[int, int] = {}

    def outcome(self, outcome: StepOutcome) -> None:
        self.issued[outcome.iteration] = len(self.engine.rates)


class Run:
    """A run over given losses."""

    def __init__(self, losses: list[float], *, lag: int, on_nan: str = "stop", **schedule: Any) -> None:
        self.engine = ScriptedEngine(losses)
        self.seen = Seen(self.engine)
        self.said: list[str] = []
        self.saved: list[tuple[int, int]] = []
        self.state = RunState()
        locator: Any = Locating()
        guard = LossGuard(locator, on_nan, None, scaled=False, log=self.said.append)
        self.schedule = plain_schedule(
            len(losses), samples=SAMPLES, length=LENGTH, **{"eval_interval": 100, **schedule}
        )
        engine: Any = self.engine
        lr_schedule: Any = type("Steps", (), {"lr": lambda self, step: float(step)})()
        self.context = LoopContext(
            engine=engine,
            lr_schedule=lr_schedule,
            train=FixedData(),
            valid=FixedData(),
            reporter=Reporter(),
            stop_requested=lambda: False,
            save=lambda state: self.saved.append((state.iteration, state.skipped)),
            check_saves=no_wait,
            synchronize=no_wait,
            peak_memory=lambda: 0,
            hooks=Hooks([self.seen, guard]),
            outcome_lag=lag,
        )

    def go(self) -> Run:
        run_loop(self.schedule, self.context, self.state)
        return self


@pytest.mark.parametrize(("lag", "issued"), [(0, 3), (1, 4)])
def test_a_run_ends_at_most_one_step_after_a_bad_one_and_names_it(lag: int, issued: int) -> None:
    run = Run([1.0, 1.0, NAN, 1.0, 1.0, 1.0], lag=lag)
    with pytest.raises(RunError, match=r"the loss of iteration 3 is nan.*samples from 4"):
        run.go()
    assert len(run.engine.rates) == issued
    assert run.saved == []


def test_values_come_when_the_next_step_is_issued_and_at_once_for_a_report() -> None:
    """The first, the fourth and the last step are reported."""
    run = Run([1.0] * 6, lag=1, log_interval=4).go()
    assert run.seen.issued == {1: 1, 2: 3, 3: 4, 4: 4, 5: 6, 6: 6}


@pytest.mark.parametrize("lag", [0, 1])
def test_a_bad_step_is_never_saved(lag: int) -> None:
    run = Run([1.0, 1.0, 1.0, NAN, 1.0, 1.0], lag=lag, save_factor=2)
    with pytest.raises(RunError, match="iteration 4"):
        run.go()
    assert run.saved == [(2, 0)]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_bad_step_is_never_evaluated(lag: int) -> None:
    run = Run([1.0, 1.0, NAN, 1.0], lag=lag, eval_interval=3, eval_iters=1)
    with pytest.raises(RunError, match="iteration 3"):
        run.go()
    assert run.engine.evaluated == 0


@pytest.mark.parametrize("lag", [0, 1])
def test_the_last_step_is_checked(lag: int) -> None:
    run = Run([1.0, 1.0, NAN], lag=lag)
    with pytest.raises(RunError, match="iteration 3"):
        run.go()
    assert run.saved == []


@pytest.mark.parametrize(("lag", "rates"), [(0, [1, 2, 3, 3, 4, 5]), (1, [1, 2, 3, 4, 4, 5])])
def test_a_skipped_step_is_counted_once_it_is_known(lag: int, rates: list[float]) -> None:
    """The learning-rate schedule counts updates, and learns of a skipped one with the host."""
    run = Run([1.0, 1.0, NAN, 1.0, 1.0, 1.0], lag=lag, on_nan="skip").go()
    assert run.engine.rates == rates
    assert run.saved == [(6, 1)]
    assert len(run.said) == 1 and "iteration 3" in run.said[0]


def test_too_many_overflows_end_the_run_one_step_later() -> None:
    run = Run([1.0, *[NAN] * 6], lag=1, on_nan="skip", overflow_limit=2)
    with pytest.raises(RunError, match=r"overflowed 2 times in a row.*up to iteration 3"):
        run.go()
    assert run.saved == []


def stopped(rank: int, world_size: int, lag: int) -> list[tuple[int, int]]:
    """Saves of a run that one rank is asked to stop during its third step."""
    run = Run([1.0] * 8, lag=lag)
    run.context = replace(run.context, stop_requested=lambda: rank == 1 and len(run.engine.rates) >= 3)
    return run.go().saved


@pytest.mark.parametrize(("lag", "iteration"), [(0, 3), (1, 4)])
def test_all_ranks_stop_after_the_same_step(lag: int, iteration: int) -> None:
    assert run_distributed(stopped, 2, lag) == [[(iteration, 0)]] * 2


def left(rank: int, world_size: int) -> list[tuple[int, int]]:
    """Saves of a run with an exit interval."""
    run = Run([1.0] * 8, lag=1)
    run.schedule = replace(run.schedule, exit_interval=3)
    return run.go().saved


def test_an_exit_interval_is_exact() -> None:
    assert run_distributed(left, 2) == [[(3, 0)]] * 2
