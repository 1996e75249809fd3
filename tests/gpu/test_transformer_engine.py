"""Transformer Engine's layers on a GPU: the losses of a run with them are those of a run without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import make_dataset, run, series

pytestmark = pytest.mark.gpu
MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "seq_length": 128,
    "max_position_embeddings": 128,
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "mlp_multiple_of": 16,
    "precision": "bfloat16",
    "zero_optimization": {"stage": 1},
}
KEYS: dict[str, dict[str, Any]] = {
    "columns": {"te_columnparallel": True},
    "rows": {"te_rowparallel": True},
    "attention": {"te_mha": True},
    "norm and MLP": {"te_layernorm_mlp": True},
    "all": {"te_columnparallel": True, "te_rowparallel": True, "te_mha": True, "te_layernorm_mlp": True},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("transformer_engine")
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("keys", KEYS)
def test_layers_compute_what_ours_compute(keys: str, dataset: str, tmp_path: Path) -> None:
    """In bfloat16 over 20 steps, within 0.02 nats of each other."""
    ours = run(1, tmp_path / "ours", backend="nccl", data_path=dataset, **MODEL)
    theirs = run(1, tmp_path / "theirs", backend="nccl", data_path=dataset, **MODEL, **KEYS[keys])
    for name in ("train/lm_loss", "validation/lm_loss"):
        assert series(theirs, name) == pytest.approx(series(ours, name), abs=0.02), name


@pytest.mark.parametrize("form", ["hybrid", "e4m3"])
def test_fp8_learns_as_bfloat16_does(form: str, dataset: str, tmp_path: Path) -> None:
    """FP8 has two or three bits after the point; over 20 steps the losses stay within 0.1 nats."""
    ours = run(1, tmp_path / "ours", backend="nccl", data_path=dataset, **MODEL)
    keys = {"te_fp8_mha": True, "te_fp8_format": form, **KEYS["all"]}
    theirs = run(1, tmp_path / "theirs", backend="nccl", data_path=dataset, **MODEL, **keys)
    losses = series(theirs, "train/lm_loss")
    assert losses == pytest.approx(series(ours, "train/lm_loss"), abs=0.1)
    assert losses[-1] < losses[0] - 0.5
