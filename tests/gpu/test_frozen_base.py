"""Frozen matrices of 4 and 8 bits on a GPU: the values of the processor, and adapters that learn beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.registry import FROZEN_FORMATS
from tests.end_to_end.runs import run, series

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", FROZEN_FORMATS.names)
def test_values_are_those_of_the_processor_and_adapters_learn(name: str, dataset: str, tmp_path: Path) -> None:
    store = FROZEN_FORMATS.load(name)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    expanded = store(weight.cuda()).expanded()
    torch.testing.assert_close(expanded.cpu(), store(weight).expanded(), rtol=1e-6, atol=1e-6)
    assert torch.equal(store(expanded).expanded(), expanded)
    adapters = {"lora": {"rank": 4, "targets": "all", "base": name}, "precision": "bfloat16"}
    adapters |= {"hidden_size": 128, "mlp_multiple_of": 64}
    saved = {"save": str(tmp_path / "save"), "load": str(tmp_path / "save"), "checkpoint_factor": 100}
    settings = {"data_path": dataset, "backend": "nccl", "eval_iters": 0, "deterministic": True, **adapters}
    full = series(run(1, tmp_path / "one", **settings), "train/lm_loss")
    run(1, tmp_path / "parts", exit_interval=10, **settings, **saved)
    later = series(run(1, tmp_path / "parts", **settings, **saved), "train/lm_loss")
    assert later == full
    assert full[-1] < full[0]
