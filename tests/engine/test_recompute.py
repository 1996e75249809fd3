"""Recomputing activations changes no bit of any gradient, dropout included, in any layout and by any of its ways.

Adam's first moment after a step is a tenth of the gradient, so the optimizer's state says whether gradients were the
same under ZeRO too, where no rank has full ones. Two steps: the second also shows whether the first left the random
states as they would have been.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron.config import Config, Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_training_engine, init_topology
from megatron.model.block import TransformerBlock
from tests.end_to_end.runs import BASE
from tests.layouts import pick
from tests.multi_rank import run_distributed

VOCABULARY = 512
FULL = {"checkpoint_activations": True}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block"}
WAYS: dict[str, dict[str, Any]] = {
    "every block": FULL,
    "full": {"recompute_granularity": "full"},
    "groups of 3": {**FULL, "checkpoint_num_layers": 3},
    "uniform, groups of 2": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "checkpoint_num_layers": 2,
    },
    "the first block": {**BLOCK, "checkpoint_num_layers": 1},
    "the first 2 blocks in host memory": {**BLOCK, "checkpoint_num_layers": 2, "checkpoint_in_cpu": True},
    "attention core": {"recompute_granularity": "selective"},
    "partitioned": {**FULL, "partition_activations": True},
    "in host memory": {**FULL, "checkpoint_in_cpu": True},
    "partitioned in host memory": {**FULL, "checkpoint_in_cpu": True, "partition_activations": True},
    "contiguous": {**FULL, "partition_activations": True, "contiguous_checkpointing": True},
    "synchronized": {**FULL, "synchronize_each_layer": True, "checkpoint_num_layers": 2},
}
LAYOUTS = pick(
    "tensor 2", "tensor 2, sequence", "pipeline 2, accumulation 4", "context 2, ZeRO 3", "data 2, ZeRO 1, bfloat16"
)
ALL, PARTS = "tensor 2, sequence", 3
"""The layout in which every way is tried each time; the others share the ways by turns, each a third of them."""
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def micro_batches(config: Config, topology: Topology) -> Iterator[MicroBatch]:
    """Random tokens, of which some do not count, the same in every call."""
    generator = torch.Generator().manual_seed(topology.data.rank)
    shape = (config.training.train_micro_batch_size_per_gpu or 0, config.model.seq_length or 0)
    while True:
        ids = torch.randint(0, VOCABULARY, (shape[0], shape[1] + 1), generator=generator)
        mask = (torch.rand(shape, generator=generator) < 0.8).float()
        yield MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask)


def trained(world_size: int, settings: dict[str, Any]) -> tuple[str, int]:
    """A digest of the optimizer's state and the weights after two steps, and how often a block was computed."""
    config = resolve([], {**BASE, **DROPOUT, **settings}, Resources(world_size)).config
    topology = init_topology(config)
    engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY)
    calls: list[None] = []
    for module in engine.deepspeed.module.modules():
        if isinstance(module, TransformerBlock):
            module.register_forward_pre_hook(lambda *_: calls.append(None))
    batches = micro_batches(config, topology)
    digest = hashlib.sha256()
    for _ in range(2):
        result = engine.train_step(batches, 1e-3)
        digest.update(f"{float(result.loss)} {float(result.grad_norm)}".encode())
    for part in engine.optimizer_shards():
        for name, tensor in sorted(part.tensors.items()):
            digest.update(f"{part.key} {part.start} {name}".encode() + tensor.float().numpy().tobytes())
    for key, weight in engine.weights().items():
        digest.update(key.encode() + weight.float().numpy().tobytes())
    return digest.hexdigest(), len(calls)


def by_way(rank: int, world_size: int, layout: dict[str, Any], names: list[str]) -> dict[str, tuple[str, int]]:
    """Way -> what it gives; "kept" without recomputation."""
    ways = {"kept": {}, **{name: WAYS[name] for name in names}}
    return {name: trained(world_size, {**layout, **way}) for name, way in ways.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_bitwise_equal(layout: str) -> None:
    turn = [name for name in LAYOUTS if name != ALL].index(layout) if layout != ALL else 0
    names = list(WAYS) if layout == ALL else list(WAYS)[turn % PARTS :: PARTS]
    world_size, settings = LAYOUTS[layout]
    for rank, found in enumerate(run_distributed(by_way, world_size, settings, names, timeout=300)):
        expected, once = found.pop("kept")
        assert [name for name, (digest, _) in found.items() if digest != expected] == [], f"rank {rank}"
        for name, (_, calls) in found.items():  # else nothing was recomputed and nothing proven
            more = {"attention core": 0, "the first block": once // found_blocks(settings)}.get(name)
            assert calls > once if more is None else calls == once + more, (name, calls, once)


def found_blocks(settings: dict[str, Any]) -> int:
    """Blocks of a rank."""
    return BASE["num_layers"] // settings.get("pipe_parallel_size", 1)


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4, "targets": "all", "dropout": 0.1}},
    "soft prompt": {"soft_prompt_tuning": {"num_tokens": 4}},
}


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_frozen_models_are_recomputed_bitwise_equal(adapters: str) -> None:
    """The first block's input, which then needs no gradient, is a leaf; some ways store it flat."""
    found = run_distributed(by_way, 1, ADAPTERS[adapters], list(WAYS))[0]
    expected, _ = found.pop("kept")
    assert [name for name, (digest, _) in found.items() if digest != expected] == []
