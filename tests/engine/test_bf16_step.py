"""The step of the bfloat16 optimizer without reads by the host, beside DeepSpeed's own: equal to the last bit."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest

from megatron.config import Resources, resolve
from megatron.engine.bf16_step import Bf16Step
from megatron.engine.builder import build_training_engine, init_topology
from tests.end_to_end import engines
from tests.multi_rank import run_distributed

STEPS, BAD = 5, 2
Trace = list[tuple[float, float, bool, list[float]]]


def traced(rank: int, world_size: int, layout: dict[str, Any]) -> dict[str, Trace]:
    """Loss, norm, flag and a sum of the master weights and moments after each step, with each of both steps."""
    found = {}
    topology = None
    for name in ("ours", "DeepSpeed's"):
        config = resolve([], {**engines.BASE, "precision": "bfloat16", **layout}, Resources(world_size)).config
        topology = topology or init_topology(config)
        engine = build_training_engine(config, topology, padded_vocab_size=engines.VOCABULARY)
        optimizer = engine.deepspeed.optimizer
        assert isinstance(optimizer.step, Bf16Step)
        if name != "ours":
            optimizer.step = MethodType(type(optimizer).step, optimizer)
            engine.clipper = None
        found[name] = _steps(engine, engines.batches(config, topology), topology.data.is_first)
    return found


def _steps(engine: Any, batches: Any, adds_nan: bool) -> Trace:
    trace: Trace = []
    weight = next(iter(engine.parameters.values()))
    for number in range(STEPS):
        handle = weight.register_hook(lambda grad: grad * float("nan")) if number == BAD and adds_nan else None
        result = engine.train_step(iter(batches), 1e-2 / (number + 1))
        if handle is not None:
            handle.remove()
        inner = engine.deepspeed.optimizer.optimizer
        state = [value for one in inner.state.values() for value in one.values()]
        masters = [tensor for group in inner.param_groups for tensor in group["params"]]
        sums = [float(tensor.detach().double().sum()) for tensor in (*masters, *state, *engine.parameters.values())]
        trace.append((float(result.loss), float(result.grad_norm), bool(result.skipped), sums))
    return trace


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {}),
        (1, {"gradient_clipping": 0.0}),
        (2, {"gradient_accumulation_steps": 2}),
        (2, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}),
    ],
    ids=["one", "no clipping", "data", "pipeline"],
)
def test_it_is_deepspeeds_to_the_last_bit(world: int, layout: dict[str, Any]) -> None:
    for both in run_distributed(traced, world, layout, timeout=300):
        assert both["ours"] == both["DeepSpeed's"]
        before, bad, after = both["ours"][BAD - 1 : BAD + 2]
        assert bad[2] and not before[2] and not after[2]
        assert bad[3] == before[3] != after[3]
