"""Averages of the weights: their values, that training goes on bit by bit, in every form of the optimizer.

The reference of the moving average is a float64 mean of the weights after each step; that of the schedule-free average
follows from the optimizer's z.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.config import Resources, resolve
from megatron.engine.base import BaseEngine
from megatron.engine.builder import build_training_engine, init_topology
from tests.end_to_end import engines
from tests.multi_rank import run_distributed

STEPS, DECAY, LR = 4, 0.7, 1e-2
ADAM: dict[str, Any] = {"optimizer": {"type": "adam", "params": {"lr": LR}}}
MUON: dict[str, Any] = {"optimizer": {"type": "muon", "params": {"lr": LR}}}
FREE: dict[str, Any] = {"optimizer": {"type": "schedulefree", "params": {"lr": LR}}}
HALF: dict[str, Any] = {"precision": "bfloat16"}
ALONE: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, muon": MUON,
    "bfloat16": {**HALF, "zero_optimization": {"stage": 1}},
}
DATA: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"zero_optimization": {"stage": 1}},
    "ZeRO 2, bfloat16": {**HALF, "zero_optimization": {"stage": 2}},
    "ZeRO 3": {"zero_optimization": {"stage": 3}},
    "ZeRO 3, bfloat16": {**HALF, "zero_optimization": {"stage": 3}},
    "muon, bfloat16": {**HALF, **MUON, "zero_optimization": {"stage": 1}},
}
TENSOR: dict[str, dict[str, Any]] = {
    "muon": {**MUON, "model_parallel_size": 2},
    "bfloat16": {**HALF, "model_parallel_size": 2, "zero_optimization": {"stage": 1}},
}
WORLDS = {"alone": (1, ALONE), "data 2": (2, DATA), "tensor 2": (2, TENSOR)}
Values = list[float]


def weights(engine: BaseEngine) -> Tensor:
    """Returns the weights that this rank saves, in one vector; collective. At ZeRO 3 only the first rank saves any."""
    found = [value.detach().double().flatten().clone() for _, value in sorted(engine.weights().items())]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)


def averaged(
    rank: int, world_size: int, cases: dict[str, dict[str, Any]], average: dict[str, Any]
) -> dict[str, dict[str, Values]]:
    """Trains each case with and without looks at the average; returns what test functions compare."""
    topology, found = None, {}
    for name, case in cases.items():
        losses, trace, means = {}, [], torch.empty(0)
        for looks in (True, False):
            config = resolve([], {**engines.BASE, **average, **case}, Resources(world_size)).config
            topology = topology or init_topology(config)
            engine = build_training_engine(config, topology, padded_vocab_size=engines.VOCABULARY)
            assert engine.average is not None
            batches = engines.batches(config, topology)
            seen = [weights(engine)]
            for step in range(STEPS):
                result = engine.train_step(iter(batches), LR)
                losses.setdefault(looks, []).append(float(result.loss))
                seen.append(weights(engine))
                if looks and step == 1:
                    with engine.average.swapped():
                        other = weights(engine)
                    assert rank or not torch.equal(other, seen[-1])
                    assert torch.equal(weights(engine), seen[-1])
            if looks:
                trace = seen
                with engine.average.swapped():
                    means = weights(engine)
        expected = trace[0]
        for later in trace[1:]:
            expected = DECAY * expected + (1 - DECAY) * later
        found[name] = {
            "looking": losses[True],
            "not looking": losses[False],
            "average": means.tolist(),
            "expected": expected.tolist(),
        }
    return found


@pytest.fixture(scope="module", params=sorted(WORLDS))
def moving(request: pytest.FixtureRequest) -> dict[str, dict[str, Values]]:
    """What the first rank found, which saves the weights."""
    world, cases = WORLDS[request.param]
    completed = {name: {**ADAM, **case} for name, case in cases.items()}
    found: dict[str, dict[str, Values]] = run_distributed(averaged, world, completed, {"ema_decay": DECAY})[0]
    return found


def test_the_moving_average_is_that_of_the_weights(moving: dict[str, dict[str, Values]]) -> None:
    """Of fp32 weights to rounding; of bfloat16 weights within theirs, since the average is of fp32 copies."""
    for name, found in moving.items():
        tolerance = 2**-7 if "bfloat16" in name else 1e-6
        assert found["average"] == pytest.approx(found["expected"], abs=tolerance, rel=tolerance), name


def test_training_goes_on_bit_by_bit_after_a_look(moving: dict[str, dict[str, Values]]) -> None:
    for name, found in moving.items():
        assert found["looking"] == found["not looking"], name
        assert found["looking"][-1] < found["looking"][0], name


def schedule_free(rank: int, world_size: int, cases: dict[str, dict[str, Any]]) -> dict[str, tuple[Values, Values]]:
    """For each case the average of the weights, and what follows from y and z."""
    topology, found = None, {}
    for name, case in cases.items():
        config = resolve([], {**engines.BASE, **FREE, **case}, Resources(world_size)).config
        topology = topology or init_topology(config)
        engine = build_training_engine(config, topology, padded_vocab_size=engines.VOCABULARY)
        for _ in range(STEPS):
            engine.train_step(iter(engines.batches(config, topology)), LR)
        with engine.saved_weights():
            mean = weights(engine)
            pieces = [(one.key, one.start, one.tensors) for one in engine.optimizer_shards()]
        parts = [
            (key, start, (values["train_weights"].double() - 0.1 * values["z"].double()) / 0.9)
            for key, start, values in pieces
        ]
        everyone: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(everyone, parts)
        merged = sorted((part for parts in everyone for part in parts), key=lambda part: part[:2])
        found[name] = (mean.tolist(), torch.cat([values for _, _, values in merged]).tolist())
    return found


@pytest.mark.parametrize("world", ["alone", "data 2"])
def test_a_schedule_free_checkpoint_has_the_average_of_the_iterates(world: str) -> None:
    size, cases = WORLDS[world]
    plain = {name: case for name, case in cases.items() if "muon" not in name}
    for name, (mean, expected) in run_distributed(schedule_free, size, plain)[0].items():
        tolerance = 2**-7 if "bfloat16" in name else 1e-6
        assert mean == pytest.approx(expected, abs=tolerance, rel=tolerance), name
