"""More tensor-parallel ranks than key heads: ranks share a head, and compute what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import run_all, same, series

MODEL: dict[str, Any] = {
    "num_layers": 2,
    "num_kv_heads": 2,
    "train_iters": 4,
    "eval_interval": 4,
    "use_qk_layernorm": True,
}
SINGLE: dict[str, Any] = {"num_kv_heads": 1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 4": (4, {"model_parallel_size": 4}),
    "tensor 4, sequence, ZeRO 1": (
        4,
        {"model_parallel_size": 4, "sequence_parallel": True, "zero_optimization": {"stage": 1}},
    ),
    "tensor 2, pipeline 2, one head": (4, {"model_parallel_size": 2, "pipe_parallel_size": 2, **SINGLE}),
    "tensor 2, ring 2, one head": (
        4,
        {"model_parallel_size": 2, "context_parallel_size": 2, "context_parallel_method": "ring", **SINGLE},
    ),
    "tensor 4, one head, recomputed": (4, {"model_parallel_size": 4, "checkpoint_activations": True, **SINGLE}),
    "tensor 2, data 2, ZeRO 3, one head": (4, {"model_parallel_size": 2, "zero_optimization": {"stage": 3}, **SINGLE}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def found(dataset: str, saved: Path) -> dict[Any, list[dict[str, float]]]:
    """The runs of one process, of the layouts, and those that go on from what one of them saved."""
    common = {**MODEL, "data_path": dataset}
    half = {**common, "save": str(saved / "half"), "exit_interval": 4, "checkpoint_factor": 4}
    rest = {**common, "load": str(saved / "half")}
    cases = {name: {**common, **settings} for name, (_, settings) in LAYOUTS.items()}
    several = {**cases, "half": {**half, "model_parallel_size": 4}}
    runs = run_all(4, saved / "four", several)
    return runs | run_all(1, saved / "one", {1: {**common, **SINGLE}, 2: common, "rest": rest})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_one_process(layout: str, found: dict[Any, list[dict[str, float]]]) -> None:
    expected = found[LAYOUTS[layout][1].get("num_kv_heads", 2)]
    same(found[layout], expected, layout)


def test_a_checkpoint_goes_on_where_no_head_is_shared(found: dict[Any, list[dict[str, float]]]) -> None:
    """Each weight is in it once, in the public layout."""
    losses = series(found["half"], "train/lm_loss") + series(found["rest"], "train/lm_loss")
    assert losses == pytest.approx(series(found[2], "train/lm_loss"), rel=1e-5)
