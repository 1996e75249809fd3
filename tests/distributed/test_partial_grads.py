"""Gradients that are terms of a sum over tensor-parallel ranks: summed once a step where the optimizer allows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter

from megatron.config import Resources, resolve
from megatron.distributed.mesh import Axis, Topology
from megatron.distributed.partial_grads import mark_partial_grad, sum_at_step, sum_together
from megatron.engine.builder import build_training_engine, init_topology
from tests.end_to_end import engines
from tests.multi_rank import run_distributed

MICRO_BATCHES = 4
BLOCKS: dict[str, Any] = {"model_parallel_size": 2, "sequence_parallel": True, "norm": "layernorm"}


def exchanged(rank: int, world_size: int, keys: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Sizes of all sums over ranks in one step, and of the marked parameters."""
    settings = {**engines.BASE, **BLOCKS, "gradient_accumulation_steps": MICRO_BATCHES, **keys}
    config = resolve([], settings, Resources(world_size)).config
    topology = init_topology(config)
    engine = build_training_engine(config, topology, padded_vocab_size=engines.VOCABULARY)
    batches = engines.batches(config, topology)
    engine.train_step(iter(batches), 1e-3)
    marked = [one.numel() for one in engine.parameters.values() if hasattr(one, "neox_partial_grad")]
    sizes: list[int] = []
    plain = dist.all_reduce

    def recording(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = recording
    engine.train_step(iter(batches), 1e-3)
    dist.all_reduce = plain
    return sizes, marked


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_a_step_sums_them_in_one_exchange(precision: str) -> None:
    for sizes, marked in run_distributed(exchanged, 2, {"precision": precision}, timeout=300):
        assert len(marked) > 10
        assert sizes.count(sum(marked)) == 1
        assert not set(sizes) & set(marked)


def test_zero_that_partitions_gradients_sums_each_as_it_arrives() -> None:
    keys = {"zero_optimization": {"stage": 2}}
    for sizes, marked in run_distributed(exchanged, 2, keys, timeout=300):
        assert sizes.count(sum(marked)) == 0
        assert sum(size in set(marked) for size in sizes) >= MICRO_BATCHES * len(marked)


def summed(rank: int, world_size: int) -> list[list[float]]:
    """Gradients of two ranks after both sums."""
    axis = init_pair(rank, world_size)
    first, second = Parameter(torch.ones(3)), Parameter(torch.ones(2, 2))
    for one in (first, second):
        mark_partial_grad(one, axis)

    def run() -> None:
        first.grad = second.grad = None
        ((rank + 1) * first.sum() + 10 * (rank + 1) * second.sum()).backward()

    run()
    found = [gradient(first), gradient(second)]
    marked = sum_at_step([first, second])
    run()
    found += [gradient(first), gradient(second)]
    sum_together([(one.grad, own) for one, own in marked if one.grad is not None])
    return [*found, gradient(first), gradient(second)]


def gradient(parameter: Parameter) -> list[float]:
    assert parameter.grad is not None
    return parameter.grad.flatten().tolist()


def init_pair(rank: int, world_size: int) -> Axis:
    return Topology.build(pipe=1, model=world_size, rank=rank, world_size=world_size).model


def test_both_sums_are_the_sum_over_the_ranks() -> None:
    for rank, found in enumerate(run_distributed(summed, 2, timeout=120)):
        total = [[3.0] * 3, [30.0] * 4]
        own = [[rank + 1.0] * 3, [10.0 * (rank + 1)] * 4]
        assert found == [*total, *own, *total]
