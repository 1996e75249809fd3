"""Steps whose loss is an outlier: left out in every layout alike, and nothing else is."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import Resources, resolve
from megatron.engine.outlier_steps import OutlierSteps
from megatron.metrics.sinks.jsonl import read_metrics
from tests.end_to_end.runs import BASE, NeverStop, series
from tests.layouts import pick
from tests.multi_rank import run_distributed

BAD_STEP, STEPS, WINDOW, DEVIATIONS = 6, 8, 4, 2.0
LAYOUTS = pick(
    "data 2, accumulation 2",
    "tensor 2",
    "pipeline 2, accumulation 4",
    "pipeline 2, accumulation 2, ZeRO 1",
    "data 2, ZeRO 2",
    "data 2, ZeRO 3",
)
LAYOUTS["interleaved"] = (
    2,
    {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4, "pipe_schedule": "interleaved"},
)
QUICK = ("data 2, accumulation 2", "pipeline 2, accumulation 4", "interleaved", "data 2, ZeRO 3")
WATCHED = {
    "train_iters": STEPS,
    "eval_iters": 0,
    "log_param_norm": True,
    "log_norms_by": "layer",
    "skip_outlier_steps": DEVIATIONS,
    "outlier_window": WINDOW,
    "optimizer": {"type": "adam", "params": {"lr": 3e-3}},
}


def test_the_limit_is_that_of_the_last_losses() -> None:
    """The mean and deviation of the window by Python's statistics, an outlier of one step among those of the next."""
    losses, history = [3.0, 3.1, 2.9, 9.0, 3.05, 3.0, 2.95], OutlierSteps(DEVIATIONS, WINDOW, torch.device("cpu"))
    for number, loss in enumerate(losses):
        last = losses[max(0, number - WINDOW) : number]
        expected = float("inf")
        if len(last) >= WINDOW // 2:
            expected = statistics.mean(last) + DEVIATIONS * statistics.stdev(last)
        assert float(history.limit()) == pytest.approx(expected)
        left_out = loss > expected
        assert bool(history.end(torch.tensor(loss), torch.tensor(left_out))) == left_out
    assert not bool(history.end(torch.tensor(2.0), torch.tensor(True))), "a gradient that was not finite is no outlier"


def test_a_step_without_a_label_changes_no_limit() -> None:
    history = OutlierSteps(DEVIATIONS, 2, torch.device("cpu"))
    for loss in (3.0, 3.2, 3.2, 0.0):
        history.end(torch.tensor(loss), torch.tensor(False))
    assert float(history.limit()) == pytest.approx(3.2)


def test_a_checkpoint_has_the_losses() -> None:
    first, second = (OutlierSteps(DEVIATIONS, 4, torch.device("cpu")) for _ in range(2))
    for loss in (3.0, 3.5, 2.5, 3.25, 3.125):
        first.end(torch.tensor(loss), torch.tensor(False))
    second.load_numbers({"cur_scale": 1.0, **first.numbers()})
    assert first.limit() == second.limit()
    assert first.limit().isfinite()


def shuffled(rank: int, world_size: int, settings: dict[str, Any]) -> list[str]:
    """Trains with labels of one step that have nothing to do with its tokens; returns what the run said."""
    from megatron.metrics.reporter import Reporter
    from megatron.training import data_setup, trainer

    said: list[str] = []
    Reporter.message = lambda self, text: said.append(text)  # type: ignore[method-assign, assignment]
    read_data = data_setup.build_data

    def data_with_a_bad_step(*args: Any, **more: Any) -> Any:
        data = read_data(*args, **more)
        read = data.train._read

        def bad(numbers: range) -> Any:
            batch = read(numbers)
            if numbers.start // 8 == BAD_STEP - 1:
                batch.labels[:] = 500  # no byte of the corpus
            return batch

        data.train._read = bad
        return data

    data_setup.build_data = data_with_a_bad_step
    trainer.train(resolve([], settings, Resources(world_size)).config, NeverStop())
    return said


def trained(world: int, dataset: str, folder: Path, **settings: Any) -> tuple[list[dict[str, float]], list[str]]:
    every = {**BASE, "data_path": dataset, "log_dir": str(folder / "logs"), **WATCHED, **settings}
    said = run_distributed(shuffled, world, every, timeout=300)[0]
    return read_metrics(folder / "logs" / "metrics.jsonl"), said


@pytest.fixture(scope="module")
def single(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, float]], list[str]]:
    return trained(1, dataset, tmp_path_factory.mktemp("one"))


def left_out(said: list[str]) -> list[str]:
    return [line.split(",")[0] for line in said if "is left out" in line]


def test_only_the_outlier_changes_no_weight(single: tuple[list[dict[str, float]], list[str]]) -> None:
    records, said = single
    assert left_out(said) == [f"the loss of iteration {BAD_STEP} is an outlier"]
    norms = [{name: value for name, value in record.items() if "parameter_norms" in name} for record in records]
    assert [step for step in range(1, STEPS) if norms[step] == norms[step - 1]] == [BAD_STEP - 1]
    losses = series(records, "train/lm_loss")
    assert all(0 < loss < 20 for loss in losses), "the loss of the step that is left out is reported"
    assert losses[BAD_STEP - 1] == max(losses)


def compare(layout: str, single: tuple[list[dict[str, float]], list[str]], dataset: str, folder: Path) -> None:
    world, settings = LAYOUTS[layout]
    records, said = trained(world, dataset, folder, **settings)
    assert left_out(said) == left_out(single[1])
    assert series(records, "train/lm_loss") == pytest.approx(series(single[0], "train/lm_loss"), rel=1e-5)


@pytest.mark.parametrize("layout", QUICK)
def test_layouts_leave_out_alike(
    layout: str, single: tuple[list[dict[str, float]], list[str]], dataset: str, tmp_path: Path
) -> None:
    compare(layout, single, dataset, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_leave_out_alike(
    layout: str, single: tuple[list[dict[str, float]], list[str]], dataset: str, tmp_path: Path
) -> None:
    compare(layout, single, dataset, tmp_path)
