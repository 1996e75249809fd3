"""Batches and sequences that grow: every layout alike, a resume in the middle, and the order of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import run, series
from tests.layouts import pick

RAMP = {"train_micro_batch_size_per_gpu": 1, "rampup_batch_size": [2, 2, 20], "eval_iters": 1}
CURRICULUM = {
    "curriculum_learning": {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": 32,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 8, "difficulty_step": 8},
    }
}
SAMPLES = {"train_iters": None, "train_samples": 100, "lr_decay_samples": 80}
GROWING: dict[str, Any] = {**RAMP, **CURRICULUM, **SAMPLES, "eval_interval": 5}
LAYOUTS = pick("pipeline 2", "data 2, ZeRO 3", "tensor 2, sequence")


@pytest.fixture(scope="module")
def single(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return run(1, tmp_path_factory.mktemp("one"), data_path=dataset, **GROWING)


def test_sizes_lengths_and_rates_are_those_of_the_plan(single: list[dict[str, float]]) -> None:
    """A stage is 20 / 3 samples: 2 samples a step up to 8, 4 up to 16, 6 up to 22. Length of step t: 8 + 3 t, in 8s."""
    tokens = series(single, "consumed_tokens")
    sizes = [2, 2, 2, 2, 4, 4, 6] + [8] * 9
    lengths = [8, 8, 16, 16, 16, 24, 24] + [32] * 9
    consumed = [sum(sizes[: step + 1]) for step in range(16)]
    assert [now - before for before, now in zip([0, *tokens], tokens, strict=False)] == [
        size * length for size, length in zip(sizes, lengths, strict=True)
    ]
    assert consumed[-1] == 94
    rates = series(single, "train/learning_rate")
    assert rates[:3] == pytest.approx([1e-3 * position / 8 for position in consumed[:3]])
    assert rates[-1] == rates[-2] == pytest.approx(1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_grow_alike(layout: str, single: list[dict[str, float]], dataset: str, tmp_path: Path) -> None:
    world, settings = LAYOUTS[layout]
    got = run(world, tmp_path, data_path=dataset, **GROWING, **settings)
    for name in ("train/lm_loss", "validation/lm_loss"):
        assert series(got, name) == pytest.approx(series(single, name), rel=1e-5), name
    assert series(got, "consumed_tokens") == series(single, "consumed_tokens")


def test_a_run_resumes_in_the_middle_of_its_growth(
    single: list[dict[str, float]], dataset: str, tmp_path: Path
) -> None:
    saved = {"save": str(tmp_path / "save"), "load": str(tmp_path / "save"), "checkpoint_factor": 100}
    run(1, tmp_path / "parts", data_path=dataset, exit_interval=4, **GROWING, **saved)
    resumed = run(1, tmp_path / "parts", data_path=dataset, **GROWING, **saved)
    for name in ("train/lm_loss", "train/learning_rate", "train/grad_norm", "consumed_tokens"):
        assert series(resumed, name) == series(single, name), name


def test_growth_leaves_the_data_in_order(dataset: str, tmp_path: Path) -> None:
    """With a learning rate of zero the loss of a batch is the mean of its samples' losses, in whichever steps."""
    still = {"optimizer": {"type": "SGD", "params": {"lr": 0.0}}, "min_lr": 0.0, "eval_iters": 0}
    ones = run(1, tmp_path / "ones", data_path=dataset, **{**still, "train_batch_size": 1, "train_iters": 24})
    pad_rows = run(1, tmp_path / "grown", data_path=dataset, **{**RAMP, **still, "train_iters": 7})
    losses, start = series(ones, "train/lm_loss"), 0
    for size, loss in zip([2, 2, 2, 2, 4, 4, 6], series(pad_rows, "train/lm_loss"), strict=True):
        assert loss == pytest.approx(sum(losses[start : start + size]) / size, rel=1e-5)
        start += size
