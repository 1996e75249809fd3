"""Recomputing activations changes no bit of a run, dropout included, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import make_dataset, run, series

FULL = {"checkpoint_activations": True}
WAYS: dict[str, dict[str, Any]] = {
    "every block": FULL,
    "groups of 3": {**FULL, "checkpoint_num_layers": 3},
    "the first block": {"recompute_granularity": "full", "recompute_method": "block", "checkpoint_num_layers": 1},
    "attention core": {"recompute_granularity": "selective"},
    "partitioned": {**FULL, "partition_activations": True},
    "in host memory": {**FULL, "checkpoint_in_cpu": True},
    "partitioned in host memory": {**FULL, "checkpoint_in_cpu": True, "partition_activations": True},
    "contiguous": {
        **FULL,
        "partition_activations": True,
        "contiguous_checkpointing": True,
        "synchronize_each_layer": True,
    },
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2": (2, {"model_parallel_size": 2}),
    "pipeline 2": (2, {"pipe_parallel_size": 2}),
    "data 2, ZeRO 3": (2, {"zero_optimization": {"stage": 3}}),
}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "train_iters": 5}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def kept(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], list[float]]]:
    """Layout -> losses and gradient norms with all activations kept."""
    runs = {
        name: run(world_size, tmp_path_factory.mktemp("kept"), data_path=dataset, **DROPOUT, **settings)
        for name, (world_size, settings) in LAYOUTS.items()
    }
    return {name: (series(one, "train/lm_loss"), series(one, "train/grad_norm")) for name, one in runs.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_changes_no_bit(
    way: str, layout: str, dataset: str, kept: dict[str, tuple[list[float], list[float]]], tmp_path: Path
) -> None:
    world_size, settings = LAYOUTS[layout]
    records = run(world_size, tmp_path, data_path=dataset, **DROPOUT, **settings, **WAYS[way])
    assert (series(records, "train/lm_loss"), series(records, "train/grad_norm")) == kept[layout]
