"""bfloat16, fp16 with its moving loss scale, sums in fp32, and optimizers in host memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.metrics.sinks.jsonl import read_metrics
from tests.end_to_end.runs import BASE, run, run_rank, series
from tests.multi_rank import RankFailedError, run_distributed

FP16 = {"precision": "fp16", "zero_optimization": {"stage": 1}, "train_iters": 10}


@pytest.fixture(scope="module")
def fp32(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return series(run(1, tmp_path_factory.mktemp("fp32"), data_path=dataset), "train/lm_loss")


def allowing_fp16(rank: int, world_size: int, settings: dict[str, Any]) -> None:
    """One worker whose processor is taken to have fp16: torch computes it everywhere, only slowly."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    run_rank(rank, world_size, settings)


def run_fp16(world_size: int, folder: Path, **settings: Any) -> list[dict[str, float]]:
    log_dir = folder / "logs"
    run_distributed(allowing_fp16, world_size, {**BASE, "log_dir": str(log_dir), **FP16, **settings}, timeout=300)
    return read_metrics(log_dir / "metrics.jsonl")


@pytest.mark.parametrize(
    "layout",
    [
        (1, {}),  # a stage 0 that is written runs as stage 1
        (2, {"zero_optimization": {"stage": 3}}),
        (2, {"pipe_parallel_size": 2, "zero_optimization": {"stage": 1}}),
        (2, {"model_parallel_size": 2, "sequence_parallel": True, "fp32_allreduce": True}),
        (2, {"context_parallel_size": 2}),
    ],
    ids=str,
)
def test_bfloat16_follows_fp32(
    layout: tuple[int, dict[str, Any]], dataset: str, fp32: list[float], tmp_path: Path
) -> None:
    """bfloat16 has 8 bits; a loss of 6 nats that is rounded in each of a few hundred operations is off by less."""
    world_size, settings = layout
    records = run(world_size, tmp_path, data_path=dataset, precision="bfloat16", **settings)
    assert series(records, "train/lm_loss") == pytest.approx(fp32, abs=0.02)


@pytest.mark.parametrize(
    "layout",
    [
        (1, {}),
        (2, {"zero_optimization": {"stage": 2}}),
        (2, {"zero_optimization": {"stage": 3}}),
        (2, {"pipe_parallel_size": 2}),
        (2, {"model_parallel_size": 2, "sequence_parallel": True}),
    ],
    ids=str,
)
def test_fp16_lowers_its_loss_scale_and_follows_fp32(
    layout: tuple[int, dict[str, Any]], dataset: str, fp32: list[float], tmp_path: Path
) -> None:
    """From 2^24 on gradients overflow; steps are skipped until the scale fits, and then the losses are fp32's."""
    scaling = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 1000}
    world_size, settings = layout
    records = run_fp16(world_size, tmp_path, data_path=dataset, fp16=scaling, train_iters=16, **settings)
    scales = series(records, "train/loss_scale")
    assert scales[0] < 2**24
    skipped = sum(later < earlier for earlier, later in zip([2**24, *scales], scales, strict=False))
    assert 0 < skipped < 10
    assert scales == sorted(scales, reverse=True)
    losses = series(records, "train/lm_loss")
    assert losses[skipped] == pytest.approx(fp32[0], abs=0.3)  # other samples, the same weights
    assert losses[-1] < losses[0]


def test_a_fixed_loss_scale_stays(dataset: str, fp32: list[float], tmp_path: Path) -> None:
    records = run_fp16(1, tmp_path, data_path=dataset, fp16={"enabled": True, "loss_scale": 128}, train_iters=20)
    assert set(series(records, "train/loss_scale")) == {128}
    assert series(records, "train/lm_loss") == pytest.approx(fp32, abs=0.02)


def test_endless_overflows_stop_the_run(dataset: str, tmp_path: Path) -> None:
    """A least scale that never fits: DeepSpeed alone would stop at once, or skip for ever."""
    scaling = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1, "min_loss_scale": 2**24}
    with pytest.raises(RankFailedError, match="gradients overflowed 3 times in a row at the least loss scale"):
        run_fp16(1, tmp_path, data_path=dataset, fp16=scaling, overflow_limit=3)


@pytest.mark.parametrize(
    "offload",
    [
        {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
        {"stage": 2, "cpu_offload": True},
        {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    ],
    ids=str,
)
def test_offload_changes_no_loss(offload: dict[str, Any], dataset: str, fp32: list[float], tmp_path: Path) -> None:
    """On a CPU host memory is the device's memory, so only the way through DeepSpeed is another."""
    records = run(2, tmp_path, data_path=dataset, zero_optimization=offload, exit_interval=8)
    assert series(records, "train/lm_loss") == pytest.approx(fp32[:8], rel=1e-5)


@pytest.mark.system
@pytest.mark.long
@pytest.mark.parametrize("parameters", [False, True])
def test_offload_to_a_disk_changes_no_loss(parameters: bool, dataset: str, fp32: list[float], tmp_path: Path) -> None:
    """Through DeepSpeed's asynchronous reads and writes, compiled here against libaio (Debian: libaio-dev)."""
    position = {"device": "nvme", "nvme_path": str(tmp_path)}
    block = {"stage": 3, "offload_optimizer": position, **({"offload_param": position} if parameters else {})}
    records = run(2, tmp_path, data_path=dataset, zero_optimization=block, timeout=1500)
    losses = series(records, "train/lm_loss")
    assert losses == pytest.approx(fp32, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_in_bfloat16(stage: int, dataset: str, fp32: list[float], tmp_path: Path) -> None:
    offload = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    records = run(2, tmp_path, data_path=dataset, precision="bfloat16", zero_optimization=offload)
    assert series(records, "train/lm_loss") == pytest.approx(fp32, abs=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bfloat16"])
def test_on_a_gpu(precision: str, dataset: str, fp32: list[float], tmp_path: Path) -> None:
    assert torch.cuda.is_available()
    records = run(1, tmp_path, data_path=dataset, precision=precision, zero_optimization={"stage": 1})
    assert series(records, "train/lm_loss")[-1] == pytest.approx(fp32[-1], abs=0.1)
