"""The bias that balances experts: against a loop in numpy over the global counts of each step.

Four ranks (two stages, two data-parallel ranks) with three micro batches a step, and one rank that continues them. What
the routers saw is recorded behind them, and everything that follows from it is computed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch

from megatron.checkpoint.load.loader import find_checkpoint
from megatron.checkpoint.save.saver import Counters, Saver
from megatron.config import Config, Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.init import init_distributed
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_training_engine
from megatron.model.moe.layer import RouterLayer
from megatron.param_table import ModelDims, tensors
from tests.end_to_end.engines import BASE, LENGTH, VOCABULARY
from tests.multi_rank import run_distributed
from tests.options import Keys

BATCH, STEPS, SAVED, TOP_K, RATE = 12, 6, 3, 2, 0.05
KEYS: Keys = {
    **BASE,
    "num_layers": 3,
    "train_batch_size": BATCH,
    "train_iters": STEPS,
    "moe_num_experts": 8,
    "moe_top_k": TOP_K,
    "moe_router_type": "topk",
    "moe_router_score_function": "sigmoid",
    "moe_normalize_top_k": True,
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": RATE,
    "moe_first_k_dense_replace": 1,
    "use_bias_in_mlp": False,
}
MANY: Keys = {
    "pipe_parallel_size": 2,
    "gradient_accumulation_steps": 3,
    "moe_expert_parallel_size": 2,
    "zero_optimization": {"stage": 1},
    "precision": "bfloat16",
}
ONE: Keys = {"precision": "bfloat16", "zero_optimization": {"stage": 1}}
Recorded = dict[str, list[numpy.ndarray]]
"""Key of a bias -> the scores of each step [tokens, experts]."""


def batches(config: Config, topology: Topology, step: int) -> list[MicroBatch]:
    """This rank's micro batches of a step; every step has other tokens."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    mine = tokens.chunk(topology.data.size)[topology.data.rank]
    parts = mine.chunk(config.training.gradient_accumulation_steps or 1)
    return [MicroBatch(part[:, :-1], part[:, 1:].contiguous(), torch.ones(part[:, 1:].shape)) for part in parts]


def train(rank: int, world: int, keys: Keys, folder: str, first: int) -> tuple[Recorded, list[dict[str, Any]]]:
    """Trains from a step on, and saves after SAVED steps; returns scores and the biases after every step."""
    where = {"load": folder} if first else {"save": folder}
    config = resolve([], {**KEYS, **keys, **where}, Resources(world)).config
    axes = config.parallelism
    topology = init_distributed(
        pipe_parallel_size=axes.pipe_parallel_size,
        model_parallel_size=axes.model_parallel_size,
        expert_parallel_size=config.moe.moe_expert_parallel_size,
        seed=1,
        backend="gloo",
    )
    table = tensors(ModelDims.of(config.model, config.moe), VOCABULARY)
    checkpoint = find_checkpoint(config, table) if first else None
    engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY, checkpoint=checkpoint)
    if checkpoint is not None:
        state = checkpoint.optimizer()
        assert state is not None
        engine.load_optimizer(state)
    recorded: Recorded = {key: [] for key in engine.biases}
    seen: dict[str, list[numpy.ndarray]] = {key: [] for key in engine.biases}
    for index, layer in engine.layers().items():
        for module in layer.modules():
            if isinstance(module, RouterLayer) and module.e_score_correction_bias is not None:
                key = f"{index}.mlp.router.e_score_correction_bias"
                module.register_forward_hook(
                    lambda _module, _inputs, logits, key=key: seen[key].append(logits.detach().sigmoid().numpy())
                )
    biases = [{key: value.clone().numpy() for key, value in engine.biases.items()}]
    for step in range(first, STEPS):
        engine.train_step(iter(batches(config, topology, step)), 1e-3)
        for key, parts in seen.items():
            recorded[key].append(numpy.concatenate(parts))
            parts.clear()
        biases.append({key: value.clone().numpy() for key, value in engine.biases.items()})
        if not first and step + 1 == SAVED:
            Saver(config, engine, padded_vocab_size=VOCABULARY).save(Counters(SAVED, SAVED * BATCH))
    return recorded, biases


def check(ranks: list[tuple[Recorded, list[dict[str, Any]]]], steps: int, start: dict[str, Any]) -> dict[str, Any]:
    """Compares the biases of all ranks with the loop from a start; returns those after SAVED steps."""
    expected = {key: value.astype(numpy.float64) for key, value in start.items()}
    saved: dict[str, Any] = {}
    for step in range(steps):
        for key, bias in expected.items():
            counts = numpy.zeros(8, dtype=numpy.int64)
            for recorded, _ in ranks:
                for scores in recorded.get(key, [[]] * steps)[step]:
                    choice = scores.astype(numpy.float64) + bias
                    counts[numpy.argsort(-choice, kind="stable")[:TOP_K]] += 1
            assert counts.sum() == BATCH * LENGTH * TOP_K
            bias += RATE * numpy.sign(counts.mean() - counts)
        for _, biases in ranks:
            for key, found in biases[step + 1].items():
                assert found.dtype == numpy.float32
                numpy.testing.assert_allclose(found, expected[key], rtol=0, atol=1e-6, err_msg=f"{key}, step {step}")
        if step + 1 == SAVED:
            saved = {key: value.copy() for key, value in expected.items()}
    return saved


def test_the_bias_is_a_loop_over_global_counts_and_survives_a_resume(tmp_path: Path) -> None:
    keys = [f"{layer}.mlp.router.e_score_correction_bias" for layer in (3, 4)]
    many = run_distributed(train, 4, MANY, str(tmp_path), 0)
    assert sorted({key for recorded, _ in many for key in recorded}) == keys
    saved = check(many, STEPS, dict.fromkeys(keys, numpy.zeros(8)))
    assert all(numpy.abs(bias).max() > RATE / 2 for bias in saved.values())
    one = run_distributed(train, 1, ONE, str(tmp_path), SAVED)
    assert one[0][1][0].keys() == saved.keys()
    for key, found in one[0][1][0].items():
        numpy.testing.assert_allclose(found, saved[key], rtol=0, atol=1e-6)
    check(one, STEPS - SAVED, saved)
