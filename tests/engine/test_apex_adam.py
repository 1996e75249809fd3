"""Apex's Adam inside DeepSpeed, at every ZeRO stage: losses and stored state beside torch's Adam."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from megatron.config import Resources, resolve
from megatron.engine import builder, optimizer_state
from megatron.engine.builder import build_training_engine, init_topology
from megatron.optim import apex_adam
from tests.end_to_end import engines
from tests.multi_rank import run_distributed
from tests.optim import apex_package

STEPS, SAVED = 4, 2
SMALL = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "kernels": "torch"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {},
    "ZeRO 2": {"zero_optimization": {"stage": 2}},
    "ZeRO 3": {"zero_optimization": {"stage": 3}},
    "bfloat16, ZeRO 1": {"precision": "bfloat16", "zero_optimization": {"stage": 1}},
}
Shards = list[tuple[str, int, set[str]]]


def trained(rank: int, world_size: int) -> dict[str, dict[str, tuple[list[float], Shards]]]:
    """Losses and what is stored, for each layout and Adam."""
    sys.modules.update(apex_package.modules())
    own = builder.load_optimizer_kernel
    topology = None
    found: dict[str, dict[str, tuple[list[float], Shards]]] = {}
    for layout, keys in LAYOUTS.items():
        for name, kernel in (("torch", own), ("apex", lambda *_: apex_adam.build)):
            builder.load_optimizer_kernel = kernel
            config = resolve([], {**engines.BASE, **SMALL, **keys}, Resources(world_size)).config
            topology = topology or init_topology(config)
            engine = build_training_engine(config, topology, padded_vocab_size=engines.VOCABULARY)
            batches = engines.batches(config, topology)
            losses = [float(engine.train_step(iter(batches), 1e-2).loss) for _ in range(STEPS)]
            shards = optimizer_state.read(engine.deepspeed.optimizer, engine.parameters, data_rank=0)
            stored = [(shard.key, shard.step, set(shard.tensors)) for shard in shards]
            found.setdefault(layout, {})[name] = (losses, stored)
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, tuple[list[float], Shards]]]:
    return run_distributed(trained, 1, timeout=300)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_stored_state_are_those_of_torch_s_adam(layout: str, found: dict[str, Any]) -> None:
    losses, stored = found[layout]["apex"]
    expected, torch_stored = found[layout]["torch"]
    low = "bfloat16" in layout  # the weights are rounded to 8 bits, now and then to the other neighbour
    assert losses == pytest.approx(expected, rel=5e-4 if low else 1e-5)
    assert losses[-1] < losses[0]
    assert stored == torch_stored
    assert {step for _, step, _ in stored} == {STEPS}
