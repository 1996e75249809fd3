"""Evaluations that can be compared: the same samples each time, and a loss of each validation set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.test_build import documents, write
from tests.end_to_end.runs import make_dataset, run, series

# A rate so small that no weight changes: what differs between two evaluations is the text alone.
STILL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "train_iters": 6,
    "eval_interval": 2,
    "eval_iters": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-12}},
    "min_lr": 0.0,
    "weight_decay": 0.0,
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Program text, and documents of rising numbers."""
    folder = tmp_path_factory.mktemp("data")
    rising = [row % 255 + 1 for row in documents(400)]
    return [make_dataset(folder), write(folder / "rising_text_document", rising)]


def evaluated(folder: Path, sets: list[str], ranks: int = 1, **more: Any) -> list[dict[str, float]]:
    folder.mkdir()
    return run(ranks, folder, **{**STILL, **more}, train_data_paths=sets[:1], valid_data_paths=sets)


def test_each_evaluation_goes_on_or_reads_the_same_samples(tmp_path: Path, sets: list[str]) -> None:
    onward = series(evaluated(tmp_path / "on", sets), "validation/lm_loss")
    again = series(evaluated(tmp_path / "again", sets, valid_same_samples=True), "validation/lm_loss")
    assert len(onward) == len(again) == 3
    assert max(onward) - min(onward) > 1e-4
    assert again == pytest.approx([again[0]] * 3, abs=1e-6)


@pytest.mark.parametrize("layout", [(1, {}), (2, {}), (2, {"pipe_parallel_size": 2})], ids=["one", "data", "pipeline"])
def test_each_set_has_the_loss_that_it_has_alone(tmp_path: Path, sets: list[str], layout: tuple[int, Any]) -> None:
    ranks, more = layout
    both = evaluated(tmp_path / "both", sets, ranks, valid_loss_per_set=True, **more)
    for name, path in zip(("text", "rising"), sets, strict=True):
        own = series(both, f"validation/{name}/lm_loss")
        alone = series(run_alone(tmp_path / name, sets[0], path), "validation/lm_loss")
        assert len(own) == 3
        assert own == pytest.approx(alone, abs=2e-5)
    assert len(series(both, "validation/lm_loss")) == 3
    assert series(both, "validation/text/lm_loss_ppl")


def run_alone(folder: Path, train: str, valid: str) -> list[dict[str, float]]:
    folder.mkdir()
    return run(1, folder, **STILL, train_data_paths=[train], valid_data_paths=[valid])
