"""Every parallel layout computes the same training run as one process does (fp32, clipping active, no dropout)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import BASE, make_dataset, run, series

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2": (2, {"model_parallel_size": 2}),
    "pipeline 1": (1, {"pipe_parallel_size": 1}),
    "pipeline 2": (2, {"pipe_parallel_size": 2}),
    "data 2": (2, {}),
    "data 2, ZeRO 1": (2, {"zero_optimization": {"stage": 1}}),
    "data 2, ZeRO 2": (2, {"zero_optimization": {"stage": 2}}),
    "data 2, ZeRO 3": (2, {"zero_optimization": {"stage": 3}}),
    "accumulation 4": (1, {"gradient_accumulation_steps": 4}),
    "tensor 2, pipeline 2": (4, {"model_parallel_size": 2, "pipe_parallel_size": 2}),
    "tensor 2, ZeRO 1": (2, {"model_parallel_size": 2, "zero_optimization": {"stage": 1}}),
    "pipeline 2, accumulation 4, ZeRO 1": (
        2,
        {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4, "zero_optimization": {"stage": 1}},
    ),
}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},  # rotary, rmsnorm, swiglu, grouped queries, untied head
    "gpt": {
        "no_weight_tying": False,
        "pos_emb": "learned",
        "norm": "layernorm",
        "activation": "gelu",
        "gpt_j_residual": True,
        "num_kv_heads": None,
    },
}

Records = list[dict[str, float]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def single(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Records]:
    """Model name -> the records of one process."""
    return {
        name: run(1, tmp_path_factory.mktemp(name), data_path=dataset, **settings) for name, settings in MODELS.items()
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_process(layout: str, model: str, dataset: str, single: dict[str, Records], tmp_path: Path) -> None:
    """Losses within 1e-5 relative at each of 20 steps; the norm within 1e-5 at step 1 and 1e-4 after."""
    world_size, settings = LAYOUTS[layout]
    records = run(world_size, tmp_path, data_path=dataset, **MODELS[model], **settings)
    expected = single[model]
    for name in ("train/lm_loss", "validation/lm_loss", "test/lm_loss"):
        assert series(records, name) == pytest.approx(series(expected, name), rel=1e-5), name
    norms, expected_norms = series(records, "train/grad_norm"), series(expected, "train/grad_norm")
    assert len(norms) == BASE["train_iters"]
    assert norms[0] == pytest.approx(expected_norms[0], rel=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_clipping_is_active_and_the_model_learns(model: str, single: dict[str, Records]) -> None:
    """Else the comparison above would prove less than it says."""
    assert min(series(single[model], "train/grad_norm")) > BASE["gradient_clipping"]
    losses = series(single[model], "train/lm_loss")
    assert losses[-1] < losses[0] - 1.0


def test_two_runs_are_bitwise_equal(dataset: str, single: dict[str, Records], tmp_path: Path) -> None:
    again = run(1, tmp_path, data_path=dataset)
    for name in ("train/lm_loss", "train/grad_norm", "validation/lm_loss"):
        assert series(again, name) == series(single["llama"], name)
