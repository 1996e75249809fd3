"""With `fp32_allreduce` nothing is summed over ranks in 16 bits: neither gradients nor activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from megatron.config import Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.engine.builder import build_training_engine, init_topology
from tests.end_to_end.runs import BASE
from tests.multi_rank import run_distributed

VOCABULARY = 512
SUMS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")
SMALL = 16  # elements: flags and norms
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data, ZeRO 1": (2, {}),
    "data, ZeRO 2": (2, {"zero_optimization": {"stage": 2}}),
    "data, ZeRO 3": (2, {"zero_optimization": {"stage": 3}}),
    "tensor": (2, {"model_parallel_size": 2}),
    "tensor, sequence": (2, {"model_parallel_size": 2, "sequence_parallel": True}),
    "pipeline x data, tied": (4, {"pipe_parallel_size": 2, "no_weight_tying": False}),
}
ALREADY_WIDE = {"data, ZeRO 1", "pipeline x data, tied"}
"""Where gradients are summed in fp32 anyway, as they accumulate in it."""


def watched(function: Callable[..., Any], found: set[str]) -> Callable[..., Any]:
    """The function, which notes the types of its larger tensors."""

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        found.update(str(tensor.dtype) for tensor in tensors if tensor.numel() > SMALL)
        return function(*args, **kwargs)

    return call


def summed_types(rank: int, world_size: int, settings: dict[str, Any]) -> set[str]:
    """The types of all tensors that a step sums over ranks."""
    config = resolve(
        [],
        {**BASE, "precision": "bfloat16", "zero_optimization": {"stage": 1}, **settings},
        Resources(world_size),
    ).config
    topology = init_topology(config)
    found: set[str] = set()
    for name in SUMS:
        setattr(dist, name, watched(getattr(dist, name), found))
    backend = deepspeed.comm.comm.cdb  # it took this function when it started
    backend.reduce_scatter_function = watched(backend.reduce_scatter_function, found)
    engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY)
    ids = torch.randint(0, VOCABULARY, (config.training.train_micro_batch_size_per_gpu or 0, 33))
    batch = MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(ids.shape[0], 32))
    found.clear()
    engine.train_step(iter([batch] * (config.training.gradient_accumulation_steps or 1)), 1e-3)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_wide(layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    for found in run_distributed(summed_types, world_size, {**settings, "fp32_allreduce": True}):
        assert found == {"torch.float32"}
    if layout not in ALREADY_WIDE:
        for found in run_distributed(summed_types, world_size, settings):
            assert "torch.bfloat16" in found
