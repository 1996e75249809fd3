"""Steps that are not finite: left out on every rank or the end of the run, and where they went wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import Resources, resolve
from megatron.metrics.sinks.jsonl import read_metrics
from megatron.training.loss_guard import LossGuard
from megatron.training.step_outcomes import StepOutcome
from megatron.training.step_schedule import StepSize
from tests.end_to_end.runs import BASE, NeverStop, series
from tests.layouts import pick
from tests.multi_rank import RankFailedError, run_distributed

BAD_STEP, BAD_SAMPLE, LAYER, MARK = 4, 26, 3, 511  # steps of 8 samples; 511 is no byte; layer 3 is the second block
LAYOUTS = pick(
    "data 2, accumulation 2",
    "tensor 2",
    "pipeline 2, accumulation 4",
    "pipeline 2, accumulation 2, ZeRO 1",
    "data 2, ZeRO 1",
    "data 2, ZeRO 2",
    "data 2, ZeRO 3",
)
QUICK = ("pipeline 2, accumulation 4", "data 2, ZeRO 3")
WATCHED = {"train_iters": 7, "eval_iters": 0, "log_param_norm": True, "log_norms_by": "layer"}


@pytest.fixture(scope="module")
def single(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, float]], list[str]]:
    return trained(1, dataset, tmp_path_factory.mktemp("one"), on_nan="skip")


def poisoned(rank: int, world_size: int, settings: dict[str, Any]) -> list[str]:
    """Trains with a layer that gives NaN for one sample; returns what the run said."""
    from megatron.distributed.tensor_parallel.embedding import VocabParallelEmbedding
    from megatron.metrics.reporter import Reporter
    from megatron.training import data_setup, trainer

    said: list[str] = []
    Reporter.message = lambda self, text: said.append(text)  # type: ignore[method-assign, assignment]
    embed, build, read_data = VocabParallelEmbedding.forward, trainer.build_training_engine, data_setup.build_data

    def shouting(self: Any, x: torch.Tensor, **more: Any) -> torch.Tensor:
        vectors = embed(self, x, **more)
        return vectors if x.is_floating_point() else vectors + 1e4 * (x == MARK).unsqueeze(-1)

    def engine_with_a_error(*args: Any, **more: Any) -> Any:
        engine = build(*args, **more)
        if LAYER in engine.layers():
            engine.layers()[LAYER].register_forward_hook(error)
        return engine

    def error(module: Any, data_setup: Any, output: torch.Tensor) -> torch.Tensor:
        loud = data_setup[0].abs().amax(dim=(0, 2)) > 1e3  # [b]
        return torch.where(loud[None, :, None], torch.nan, output)

    def data_with_a_mark(*args: Any, **more: Any) -> Any:
        data = read_data(*args, **more)
        read = data.train._read

        def marking(numbers: range) -> Any:
            batch = read(numbers)
            if BAD_SAMPLE in numbers:
                batch.tokens[numbers.index(BAD_SAMPLE), 0] = MARK
            return batch

        data.train._read = marking
        return data

    VocabParallelEmbedding.forward = shouting  # type: ignore[method-assign, assignment]
    trainer.build_training_engine, data_setup.build_data = engine_with_a_error, data_with_a_mark
    trainer.train(resolve([], settings, Resources(world_size)).config, NeverStop())
    return said


def trained(world: int, dataset: str, folder: Path, **settings: Any) -> tuple[list[dict[str, float]], list[str]]:
    """The records of a run with one bad sample, and what its first rank said."""
    every = {**BASE, "data_path": dataset, "log_dir": str(folder / "logs"), **WATCHED, **settings}
    said = run_distributed(poisoned, world, every, timeout=300)[0]
    return read_metrics(folder / "logs" / "metrics.jsonl"), said


def reported_samples(said: list[str]) -> tuple[int, int]:
    """First and last sample that the message about the bad step names; everything else in it is asserted."""
    (line,) = [text for text in said if "is left out" in text]
    assert f"the loss of iteration {BAD_STEP} is nan" in line
    assert "samples 24 to 31 of the training data" in line
    found = re.search(rf"first in layer {LAYER} on rank (\d), in samples (\d+) to (\d+)", line)
    assert found is not None, line
    return int(found.group(2)), int(found.group(3))


def test_a_skipped_step_changes_no_weight(single: tuple[list[dict[str, float]], list[str]]) -> None:
    records, said = single
    assert reported_samples(said) == (24, 31)
    norms = [{name: value for name, value in record.items() if "parameter_norms" in name} for record in records]
    assert len(norms[0]) == 7  # embedding, four blocks, norm, head
    assert norms[BAD_STEP - 1] == norms[BAD_STEP - 2]
    assert norms[BAD_STEP] != norms[BAD_STEP - 1]
    rates = series(records, "train/learning_rate")
    assert rates[BAD_STEP] == rates[BAD_STEP - 1]  # the schedule counts updates


def compare(layout: str, single: tuple[list[dict[str, float]], list[str]], dataset: str, folder: Path) -> None:
    world, settings = LAYOUTS[layout]
    records, said = trained(world, dataset, folder, on_nan="skip", **settings)
    first, last = reported_samples(said)
    assert first <= BAD_SAMPLE <= last
    expected = series(single[0], "train/lm_loss")
    got = series(records, "train/lm_loss")
    assert got[: BAD_STEP - 1] + got[BAD_STEP:] == pytest.approx(
        expected[: BAD_STEP - 1] + expected[BAD_STEP:], rel=1e-5
    )


@pytest.mark.parametrize("layout", QUICK)
def test_layouts_skip_alike(
    layout: str, single: tuple[list[dict[str, float]], list[str]], dataset: str, tmp_path: Path
) -> None:
    compare(layout, single, dataset, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_skip_alike(
    layout: str, single: tuple[list[dict[str, float]], list[str]], dataset: str, tmp_path: Path
) -> None:
    compare(layout, single, dataset, tmp_path)


def test_a_run_stops_where_it_was_reported_to(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match=rf"iteration {BAD_STEP} is nan.*first in layer {LAYER} on rank 0"):
        trained(1, dataset, tmp_path)


class FixedLocator:
    """Replaces the locator."""

    def locate_nonfinite(self, consumed: int, size: StepSize) -> str:
        return "here"

    def locate_spike(self, consumed: int, size: StepSize) -> str:
        return f"samples from {consumed}"


def test_steps_without_a_token_to_learn_are_in_no_mean() -> None:
    said: list[str] = []
    guard = LossGuard(FixedLocator(), "stop", 2.0, scaled=False, log=said.append)  # type: ignore[arg-type]
    losses = [3.0] * 12 + [0.0] * 20 + [4.0, 7.0]
    for number, loss in enumerate(losses):
        size = StepSize(8, 1, 32, 32)
        guard.outcome(StepOutcome(number + 1, 8 * number, size, loss, 1.0, 1.0, skipped=False))
    assert [line.split(":")[0] for line in said] == ["loss spike at iteration 34"]


def test_a_spike_is_reported_and_not_in_the_mean() -> None:
    said: list[str] = []
    guard = LossGuard(FixedLocator(), "stop", 2.0, scaled=False, log=said.append)  # type: ignore[arg-type]
    size = StepSize(8, 1, 32, 32)
    losses = [3.0] * 12 + [7.0] + [3.0] * 5 + [7.0]
    for number, loss in enumerate(losses):
        guard.outcome(StepOutcome(number + 1, 8 * number, size, loss, 1.0, 1.0, skipped=False))
    assert said == [
        "loss spike at iteration 13: 7.0000 (running mean 3.0000): samples from 96",
        "loss spike at iteration 19: 7.0000 (running mean 3.0000): samples from 144",
    ]
