"""One rank that has all the data: no gradient is copied for an all-reduce, and missing gradients are zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.config import Resources, resolve
from megatron.engine.builder import build_training_engine, init_topology
from tests.end_to_end import engines
from tests.multi_rank import run_distributed

FP32 = {"precision": "fp32", "zero_optimization": {"stage": 0}}


def reduced(rank: int, world_size: int, layout: dict[str, Any]) -> tuple[int, float]:
    """Elements of the largest all-reduce of a step, and the change of a weight that had no gradient."""
    largest, reduce = [0], dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **named: Any) -> Any:
        largest[0] = max(largest[0], tensor.numel())
        return reduce(tensor, *args, **named)

    dist.all_reduce = counting
    config = resolve([], {**engines.BASE, **layout}, Resources(world_size)).config
    topology = init_topology(config)
    engine = build_training_engine(config, topology, padded_vocab_size=engines.VOCABULARY)
    unused = torch.nn.Parameter(torch.ones(3, 3))
    if layout["zero_optimization"]["stage"] == 0:
        engine.deepspeed.module.register_parameter("unused", unused)
        engine.deepspeed.optimizer.param_groups[0]["params"].append(unused)
        engine.deepspeed.optimizer.param_groups[0]["weight_decay"] = 0.5
    engine.train_step(iter(engines.batches(config, topology)), 1e-2)
    return largest[0], float((unused.detach() - 1).abs().max())


@pytest.mark.parametrize(
    "layout",
    [FP32, {"precision": "bfloat16", "zero_optimization": {"stage": 1}}, {**FP32, "pipe_parallel_size": 1}],
    ids=["fp32", "bfloat16", "pipeline"],
)
def test_one_rank_copies_no_gradients(layout: dict[str, Any]) -> None:
    ((elements, change),) = run_distributed(reduced, 1, layout)
    assert elements < 1000
    if layout["zero_optimization"]["stage"] == 0:
        assert change == pytest.approx(0.5 * 1e-2, rel=1e-3)  # decayed, as every parameter


def test_two_ranks_reduce_all_gradients() -> None:
    found = run_distributed(reduced, 2, FP32)
    assert all(elements > 10_000 and change == pytest.approx(0.5e-2, rel=1e-3) for elements, change in found)
