"""Value residual in every layout: the values of the first block reach all others, and compute what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.config import Resources, resolve
from megatron.distributed.init import init_distributed
from megatron.engine.builder import build_inference_engine
from tests.end_to_end.runs import BASE, run_all, same, series
from tests.multi_rank import run_distributed

MODEL: dict[str, Any] = {
    "num_layers": 4,
    "num_kv_heads": 2,
    "value_residual": True,
    "train_iters": 3,
    "eval_interval": 3,
}
PIPELINE: dict[str, Any] = {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4}
CHUNKS = {"num_layers_per_virtual_pipeline_stage": 1, **PIPELINE}
TENSOR = {"model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 4, shared heads": {"model_parallel_size": 4},
    "tensor 4, shared heads, sequence": {"model_parallel_size": 4, "sequence_parallel": True},
    "tensor 2, sequence, pipeline 2": {**TENSOR, **PIPELINE, "checkpoint_activations": True},
    "a stage without blocks": {"pipe_parallel_size": 4, "pipe_partition_method": "uniform"},
    "interleaved, tensor 2, sequence": {**CHUNKS, **TENSOR, "pipe_schedule": "interleaved"},
    "zero bubble": {**PIPELINE, "pipe_schedule": "zero_bubble", "zero_optimization": {"stage": 1}},
    "DualPipeV, recomputed": {**PIPELINE, "pipe_schedule": "dualpipev", "checkpoint_activations": True},
    "ring 2, tensor 2": {"context_parallel_size": 2, "context_parallel_method": "ring", "model_parallel_size": 2},
    "Ulysses 2, ZeRO 3": {"context_parallel_size": 2, "zero_optimization": {"stage": 3}},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def found(dataset: str, saved: Path) -> dict[Any, list[dict[str, float]]]:
    """The runs of one process, of the layouts, and those that go on from what one of them saved."""
    common = {**MODEL, "data_path": dataset}
    half = {**common, "save": str(saved / "half"), "exit_interval": 1, "checkpoint_factor": 1}
    rest = {**common, "load": str(saved / "half")}
    cases = {name: {**common, **settings} for name, settings in LAYOUTS.items()}
    runs = run_all(4, saved / "four", {**cases, "half": {**half, **LAYOUTS["interleaved, tensor 2, sequence"]}})
    return runs | run_all(1, saved / "one", {"one": common, "rest": rest})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_one_process(layout: str, found: dict[Any, list[dict[str, float]]]) -> None:
    same(found[layout], found["one"], layout)


def test_a_checkpoint_goes_on_in_another_layout(found: dict[Any, list[dict[str, float]]]) -> None:
    losses = series(found["half"], "train/lm_loss") + series(found["rest"], "train/lm_loss")
    assert losses == pytest.approx(series(found["one"], "train/lm_loss"), rel=1e-5)


def cached_and_full(rank: int, stages: int, folder: str) -> tuple[Tensor, Tensor]:
    """Logits [b, s, v] of a text read in three parts with a cache, and at once without."""
    settings = {**BASE, **MODEL, "load": folder, "pipe_parallel_size": stages if stages > 1 else 0}
    config = resolve([], settings, Resources(stages)).config
    topology = init_distributed(pipe_parallel_size=stages, model_parallel_size=1, seed=1, backend="gloo")
    engine = build_inference_engine(config, topology, 512)
    tokens = torch.randint(0, 128, (3, 12), generator=torch.Generator().manual_seed(2))
    cache = engine.new_cache(3, 12)
    parts = [engine.logits(part, cache).clone() for part in tokens.split((6, 5, 1), dim=1)]
    return torch.cat(parts, dim=1), engine.logits(tokens).clone()


def test_stages_generate_as_one_process(found: dict[Any, list[dict[str, float]]], saved: Path) -> None:
    folder = str(saved / "half")
    two, one = (run_distributed(cached_and_full, stages, folder)[0] for stages in (2, 1))
    for logits in (*two, one[0]):
        torch.testing.assert_close(logits, one[1], rtol=1e-5, atol=1e-5)
