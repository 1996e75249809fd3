"""Optimizers on a GPU: 8-bit state, fused kernels, whole matrices; and the snapshot of the GPU's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.registry import EIGHT_BIT, OPTIMIZERS
from tests.end_to_end.runs import run, series
from tests.end_to_end.test_optimizers import PARAMS

pytestmark = pytest.mark.gpu


def losses(name: str, folder: Path, dataset: str, **settings: Any) -> list[float]:
    chosen = {"type": name, "params": PARAMS[name]}
    records = run(1, folder, data_path=dataset, backend="nccl", optimizer=chosen, eval_iters=0, **settings)
    return series(records, "train/lm_loss")


@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS.names if "cpu_offload" not in OPTIMIZERS.entry(name).traits]
)
def test_every_optimizer_learns_as_on_the_cpu(
    name: str, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = losses(name, tmp_path / "gpu", dataset)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    chosen = {"type": name, "params": PARAMS[name]}
    here = series(run(1, tmp_path / "cpu", data_path=dataset, optimizer=chosen, eval_iters=0), "train/lm_loss")
    assert there == pytest.approx(here, rel=1e-2)
    assert there[-1] < there[0] - 0.2


@pytest.mark.parametrize("name", EIGHT_BIT.names)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_eight_bit_state_resumes_bitwise(name: str, stage: int, dataset: str, tmp_path: Path) -> None:
    low = {"use_bnb_optimizer": True, "zero_optimization": {"stage": stage}, "deterministic": True}
    saved = {"save": str(tmp_path / "save"), "load": str(tmp_path / "save"), "checkpoint_factor": 100}
    full = losses(name, tmp_path / "whole", dataset, **low)
    losses(name, tmp_path / "parts", dataset, exit_interval=10, **low, **saved)
    assert losses(name, tmp_path / "parts", dataset, **low, **saved) == full
    assert full[-1] < full[0] - 0.2


def test_an_offloaded_optimizer_runs_on_the_host(dataset: str, tmp_path: Path) -> None:
    offloaded = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    expected = losses("adam", tmp_path / "gpu", dataset)
    got = losses("cpu_adam", tmp_path / "host", dataset, zero_optimization=offloaded)
    assert got == pytest.approx(expected, rel=1e-4)


def test_a_snapshot_of_the_memory(dataset: str, tmp_path: Path) -> None:
    settings = {"memory_profiling": True, "memory_profiling_path": str(tmp_path), "profile_step_start": 2}
    losses("adam", tmp_path, dataset, profile_step_stop=4, **settings)
    assert (tmp_path / "mem_snapshot.pickle").stat().st_size > 1000
