"""What every layout must leave alone; that it computes what one process does is the matter of tests/parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import run, series

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "train_iters": 6}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2, sequence": (2, {"model_parallel_size": 2, "sequence_parallel": True}),
    "pipeline 2, accumulation 2": (2, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}),
    "context 2, ZeRO 3": (2, {"context_parallel_size": 2, "zero_optimization": {"stage": 3}}),
}


def curves(records: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    return series(records, "train/lm_loss"), series(records, "train/grad_norm")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluating_changes_nothing(layout: str, dataset: str, tmp_path: Path) -> None:
    """Two runs with dropout, one that evaluates after every step and one that never does, are bitwise equal."""
    world_size, settings = LAYOUTS[layout]
    never = run(world_size, tmp_path / "never", data_path=dataset, eval_iters=0, **DROPOUT, **settings)
    often = run(world_size, tmp_path / "often", data_path=dataset, eval_interval=1, **DROPOUT, **settings)
    assert len(series(often, "validation/lm_loss")) == DROPOUT["train_iters"]
    assert curves(often) == curves(never)


@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_changes_nothing(tied: bool, dataset: str, tmp_path: Path) -> None:
    """512 tokens in 513 rows on one rank, in 684 on two."""
    settings = {"data_path": dataset, "make_vocab_size_divisible_by": 171, "no_weight_tying": not tied}
    settings |= {"train_iters": 6, "eval_interval": 6}
    one = run(1, tmp_path / "one", **settings)
    two = run(2, tmp_path / "two", model_parallel_size=2, **settings)
    for name in ("train/lm_loss", "validation/lm_loss"):
        assert series(two, name) == pytest.approx(series(one, name), rel=1e-5), name
    assert series(two, "train/grad_norm") == pytest.approx(series(one, "train/grad_norm"), rel=1e-4)


@pytest.mark.parametrize(
    ("layout", "deterministic"), [*((layout, False) for layout in ["one", *LAYOUTS]), ("tensor 2, sequence", True)]
)
def test_two_runs_are_bitwise_equal(layout: str, deterministic: bool, dataset: str, tmp_path: Path) -> None:
    world_size, settings = LAYOUTS.get(layout, (1, {}))
    keys = {"data_path": dataset, "deterministic": deterministic, **DROPOUT, "train_iters": 3, **settings}
    assert curves(run(world_size, tmp_path / "one", **keys)) == curves(run(world_size, tmp_path / "two", **keys))


def last_losses(records: list[dict[str, float]]) -> list[float]:
    return series(records, "train/lm_loss")[-50:]


@pytest.mark.long
def test_bfloat16_stays_with_fp32_for_200_steps(dataset: str, tmp_path: Path) -> None:
    """Mean difference of the last 50 losses at most 0.02 nats, to fp32 and between layouts."""
    settings = {"data_path": dataset, "train_iters": 200, "eval_interval": 200}
    low = {**settings, "precision": "bfloat16", "zero_optimization": {"stage": 1}}
    exact = last_losses(run(1, tmp_path / "fp32", **settings))
    found = [
        last_losses(run(world_size, tmp_path / str(number), **{**low, **layout}))
        for number, (world_size, layout) in enumerate(
            [
                (1, {}),
                (2, {"model_parallel_size": 2, "sequence_parallel": True}),
                (2, {"pipe_parallel_size": 2}),
                (2, {"context_parallel_size": 2, "zero_optimization": {"stage": 3}}),
            ]
        )
    ]
    for other in (exact, found[0]):
        for losses in found:
            assert sum(abs(a - b) for a, b in zip(losses, other, strict=True)) / 50 <= 0.02
