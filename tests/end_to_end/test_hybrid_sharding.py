"""ZeRO 3 whose weights are gathered within groups of ranks (ZeRO++'s secondary partitions, arXiv:2306.10209)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config import Resources, resolve
from megatron.distributed.init import init_distributed
from megatron.engine.builder import build_training_engine
from megatron.errors import ConfigError
from tests.end_to_end.engines import BASE, VOCABULARY, batches
from tests.end_to_end.runs import run, series
from tests.multi_rank import run_distributed

ZERO = {"stage": 3, "zero_hpz_partition_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data 4": {},
    "tensor 2, data 2": {"model_parallel_size": 2},
    "context 2, data 2": {"context_parallel_size": 2},
    "data 4, bfloat16": {"precision": "bfloat16"},
}


@pytest.fixture(scope="module")
def curves(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[str, Any] = {}

    def of_one_process(precision: str) -> Any:
        if precision not in known:
            known[precision] = run(1, tmp_path_factory.mktemp("one"), **settings(dataset), precision=precision)
        return known[precision]

    return of_one_process


def settings(dataset: str) -> dict[str, Any]:
    return {"data_path": dataset, "train_iters": 6, "eval_interval": 3}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_compute_what_one_process_does(layout: str, dataset: str, tmp_path: Path, curves: Any) -> None:
    precision = LAYOUTS[layout].get("precision", "fp32")
    four = run(4, tmp_path, zero_optimization=ZERO, **{**settings(dataset), "precision": precision, **LAYOUTS[layout]})
    for name, least in (("train/lm_loss", 1e-5), ("validation/lm_loss", 1e-5), ("train/grad_norm", 1e-4)):
        tolerance = least if precision == "fp32" else 2e-2
        assert series(four, name) == pytest.approx(series(curves(precision), name), rel=tolerance), name


def secondary_shares(rank: int, world_size: int) -> list[tuple[int, int, int]]:
    """Elements of a weight that this rank has in its first and its second partition, and of the whole weight."""
    config = resolve([], {**BASE, "zero_optimization": {**ZERO, "stage3_param_persistence_threshold": 0}}, Resources(4))
    topology = init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1)
    engine = build_training_engine(config.config, topology, padded_vocab_size=VOCABULARY)
    found: list[tuple[int, int, int]] = []
    optimizer = engine.deepspeed.optimizer
    forget = optimizer.invalidate_secondary_tensor

    def look_and_forget() -> None:  # behind the backward pass; the step makes new weights
        large = [each for each in engine.parameters.values() if each.ds_numel % 4 == 0]
        found.extend((each.ds_tensor.numel(), each.ds_secondary_tensor.numel(), each.ds_numel) for each in large)
        forget()

    optimizer.invalidate_secondary_tensor = look_and_forget
    engine.train_step(iter(batches(config.config, topology)), 1e-3)
    return found


def test_each_group_keeps_all_weights_and_all_ranks_share_the_rest() -> None:
    for shares in run_distributed(secondary_shares, 4):
        assert len(shares) > 10
        assert all((first * 4, second * 2) == (full, full) for first, second, full in shares)


@pytest.mark.parametrize(
    ("zero", "reported"),
    [
        ({"stage": 2, "zero_hpz_partition_size": 2}, "needs stage 3"),
        ({"stage": 3, "zero_hpz_partition_size": 3}, "does not divide the 4 ranks.*give 2 or 4"),
        ({"stage": 3, "zero_hpz_partition_size": "two"}, "counts ranks"),
        ({"stage": 3, "zero_hpz_partition_size": 0}, "counts ranks"),
    ],
)
def test_groups_that_cannot_be_are_refused(zero: dict[str, Any], reported: str) -> None:
    with pytest.raises(ConfigError, match=reported):
        resolve([], {**BASE, "zero_optimization": zero}, Resources(4))
