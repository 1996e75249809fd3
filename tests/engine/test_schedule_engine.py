"""The engine with several stages on a rank: logits with and without a cache, recomputation, and what it frees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron.config import Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.engine.builder import build_training_engine, init_topology
from megatron.engine.scheduled_engine import ScheduledEngine
from tests.end_to_end.runs import BASE
from tests.multi_rank import run_cases

VOCABULARY, LENGTH = 256, 16
SCHEDULES = ("1f1b", "interleaved", "zero_bubble", "dualpipev")
SETTINGS: dict[str, Any] = {
    **BASE,
    "hidden_size": 32,
    "seq_length": LENGTH,
    "pipe_parallel_size": 2,
    "train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "no_weight_tying": False,
    "attention_config": ["global", "mamba", "global", "global"],
    "data_path": "unused",
}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "attention_config": None}
RECOMPUTED = {"checkpoint_activations": True}


def micro_batches() -> Iterator[MicroBatch]:
    """Random tokens, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    while True:
        ids = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=generator)
        yield MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(2, LENGTH))


def used(rank: int, world_size: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Two steps and an evaluation; the weights, logits in one call and with a cache, and what the stages hold."""
    config = resolve([], {**SETTINGS, **settings}, Resources(world_size)).config
    engine = build_training_engine(config, init_topology(config), padded_vocab_size=VOCABULARY)
    batches = micro_batches()
    for _ in range(2):
        engine.train_step(batches, 1e-2)
    losses = engine.eval_sums(batches, 3)
    tokens = next(batches).tokens
    cache = engine.new_cache(2, LENGTH)
    parts = [engine.logits(part, cache) for part in tokens.split((5, 1, 10), dim=1)]
    stages = engine.stages if isinstance(engine, ScheduledEngine) else []
    left = [value for stage in stages for name, value in vars(stage).items() if name[0] == "_" and type(value) is dict]
    return {
        "weights": {key: value.clone() for key, value in engine.weights().items()},
        "losses": losses,
        "logits": engine.logits(tokens),
        "cached": torch.cat(parts, dim=1),
        "held": sum(map(len, left)),
    }


@pytest.fixture(scope="module")
def found() -> dict[Any, list[dict[str, Any]]]:
    """(schedule, changes) -> what each rank has."""
    cases: dict[Any, Any] = {(name, "plain"): (used, {"pipe_schedule": name}) for name in SCHEDULES}
    for name in SCHEDULES[1:]:
        cases[name, "dropout"] = (used, {**DROPOUT, "pipe_schedule": name})
        cases[name, "recomputed"] = (used, {**DROPOUT, **RECOMPUTED, "pipe_schedule": name})
    return run_cases(cases, 2)


@pytest.mark.parametrize("name", SCHEDULES[1:])
def test_logits_and_losses_are_those_of_one_stage_a_rank(name: str, found: dict[Any, list[dict[str, Any]]]) -> None:
    expected, _ = found["1f1b", "plain"]
    for rank in found[name, "plain"]:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        torch.testing.assert_close(rank["logits"], expected["logits"], rtol=0, atol=1e-4)
        torch.testing.assert_close(rank["cached"], rank["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES[1:])
def test_nothing_is_held_after_a_step(name: str, found: dict[Any, list[dict[str, Any]]]) -> None:
    assert [rank["held"] for rank in found[name, "plain"]] == [0, 0]


@pytest.mark.parametrize("name", SCHEDULES[1:])
def test_recomputed_blocks_draw_the_same_dropout(name: str, found: dict[Any, list[dict[str, Any]]]) -> None:
    for plain, recomputed in zip(found[name, "dropout"], found[name, "recomputed"], strict=True):
        assert plain["weights"].keys() == recomputed["weights"].keys()
        for key, weight in plain["weights"].items():
            assert torch.equal(weight, recomputed["weights"][key]), key
    without = found[name, "plain"][0]["weights"]
    drawn = found[name, "dropout"][0]["weights"]
    assert any(not torch.equal(drawn[key], weight) for key, weight in without.items() if key in drawn)
