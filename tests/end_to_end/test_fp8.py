"""Training with the products of linear layers in FP8: near bfloat16, and alike in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron.registry.fp8 import FP8_RECIPES
from tests.end_to_end.runs import run, run_all, series
from tests.layouts import pick

MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_kv_heads": 4,
    "intermediate_size": 768,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "train_batch_size": 4,
    "train_iters": 10,
    "eval_interval": 10,
    "eval_iters": 1,
    "precision": "bfloat16",
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-3, "eps": 1.0e-6}},
}
LAYOUTS = pick("tensor 2, sequence, recomputed", "pipeline 2", "data 2, ZeRO 1")
LOSS, NORM = 0.005, 0.1
"""Relative differences of a step between layouts: operands that are summed elsewhere are rounded elsewhere."""


def keys(recipe: str | None, **more: Any) -> dict[str, Any]:
    return {**MODEL, **more} if recipe is None else {**MODEL, "fp8": {"recipe": recipe}, **more}


@pytest.fixture(scope="module")
def alone(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """Runs of one process: bfloat16, each recipe, and each with recomputed blocks."""
    cases = {"bfloat16": keys(None), **{recipe: keys(recipe) for recipe in FP8_RECIPES}}
    cases |= {f"{recipe}, recomputed": keys(recipe, checkpoint_activations=True) for recipe in FP8_RECIPES}
    folder = tmp_path_factory.mktemp("fp8")
    return run_all(1, folder, {name: {"data_path": dataset, **each} for name, each in cases.items()})


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_the_loss_is_near_that_of_bfloat16(recipe: str, alone: dict[str, list[dict[str, float]]]) -> None:
    usual, found = (numpy.array(series(alone[name], "train/lm_loss")) for name in ("bfloat16", recipe))
    assert usual[-1] < usual[0] - 0.5
    assert 0 < numpy.abs(found / usual - 1).max() < 0.01
    usual, found = (numpy.array(series(alone[name], "train/grad_norm")) for name in ("bfloat16", recipe))
    assert 0 < numpy.abs(found / usual - 1).max() < 0.1


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_recomputed_blocks_are_rounded_alike(recipe: str, alone: dict[str, list[dict[str, float]]]) -> None:
    for name in ("train/lm_loss", "train/grad_norm", "validation/lm_loss"):
        assert series(alone[f"{recipe}, recomputed"], name) == series(alone[recipe], name)


def test_layouts_agree(alone: dict[str, list[dict[str, float]]], dataset: str, tmp_path: Path) -> None:
    cases = {
        (recipe, name): keys(recipe, data_path=dataset, **LAYOUTS[name][1])
        for recipe, name in zip(FP8_RECIPES, LAYOUTS, strict=True)
    }
    for (recipe, name), records in run_all(2, tmp_path, cases).items():
        for metric, tolerance in (("train/lm_loss", LOSS), ("train/grad_norm", NORM), ("validation/lm_loss", LOSS)):
            usual, found = (numpy.array(series(each, metric)) for each in (alone[recipe], records))
            assert numpy.abs(found / usual - 1).max() < tolerance, (recipe, name, metric)


@pytest.mark.long  # compilation takes most of a minute
def test_compiled_blocks_agree(alone: dict[str, list[dict[str, float]]], dataset: str, tmp_path: Path) -> None:
    records = run(1, tmp_path, **keys("rowwise", data_path=dataset, compile=True))
    found = series(records, "train/lm_loss")
    assert found == pytest.approx(series(alone["rowwise"], "train/lm_loss"), rel=LOSS)
