"""A step's loss and gradient are the mean over all unmasked tokens of its global batch, however it is distributed.

The reference is the whole batch at once in float64: torch's cross entropy, clipping and AdamW around the sequential
model. Weighing micro batches, ranks or parts of sequences alike instead would be off by tens of percent with these
masks, of which the smallest counts nothing and the largest everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.config import Config, Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_training_engine, init_topology
from megatron.engine.engine import eval_loss
from megatron.engine.loss_normalization import loss_divisor
from megatron.model.layers import build_layer_specs
from megatron.model.model_spec import ModelSpec
from megatron.model.sequential_model import SequentialModel
from megatron.optim.param_groups import parameter_groups
from tests.end_to_end.runs import BASE
from tests.multi_rank import run_distributed

SAMPLES, LENGTH, VOCABULARY, STEPS, RATE, CLIP = 8, 32, 512, 3, 1e-3, 0.5
KEEPING = (1.0, 0.02, 0.0, 0.6, 0.05, 1.0, 0.3, 0.0)
"""Which part of each sample's tokens counts."""

TIED = {"no_weight_tying": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "accumulation": (1, {"gradient_accumulation_steps": 8}),
    "data, ZeRO 0": (2, {"gradient_accumulation_steps": 2}),
    "data, ZeRO 1": (2, {"gradient_accumulation_steps": 4, "zero_optimization": {"stage": 1}}),
    "data, ZeRO 2": (2, {"gradient_accumulation_steps": 2, "zero_optimization": {"stage": 2}}),
    "data, ZeRO 3": (4, {"gradient_accumulation_steps": 2, "zero_optimization": {"stage": 3}}),
    "context": (2, {"context_parallel_size": 2, "gradient_accumulation_steps": 4}),
    "data x context, ZeRO 3": (
        4,
        {"context_parallel_size": 2, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": 3}},
    ),
    "tensor, sequence": (
        2,
        {"model_parallel_size": 2, "sequence_parallel": True, "gradient_accumulation_steps": 8},
    ),
    "pipeline of one": (1, {"pipe_parallel_size": 1, "gradient_accumulation_steps": 4}),
    "pipeline": (4, {"pipe_parallel_size": 4, "gradient_accumulation_steps": 8}),
    "pipeline, blocks listed": (
        2,
        {"pipe_parallel_size": 2, "pipe_partition_method": [3, 1], "gradient_accumulation_steps": 2},
    ),
    "pipeline by parameters": (
        2,
        {"pipe_parallel_size": 2, "pipe_partition_method": "parameters", "gradient_accumulation_steps": 2},
    ),
    "pipeline, uniform": (
        2,
        {"pipe_parallel_size": 2, "pipe_partition_method": "uniform", "gradient_accumulation_steps": 2},
    ),
    "pipeline by class": (
        2,
        {"pipe_parallel_size": 2, "pipe_partition_method": "type:norm|block", "gradient_accumulation_steps": 2},
    ),
    "tied, pipeline x tensor, ZeRO 1": (
        4,
        {
            **TIED,
            "pipe_parallel_size": 2,
            "model_parallel_size": 2,
            "sequence_parallel": True,
            "gradient_accumulation_steps": 4,
            "zero_optimization": {"stage": 1},
        },
    ),
    "tied, pipeline x data": (4, {**TIED, "pipe_parallel_size": 2, "gradient_accumulation_steps": 2}),
    "pipeline x data x tensor, ZeRO 1": (
        8,
        {
            "pipe_parallel_size": 2,
            "model_parallel_size": 2,
            "gradient_accumulation_steps": 4,
            "zero_optimization": {"stage": 1},
        },
    ),
}


def samples() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and labels [step, sample, s], and masks whose density differs from sample to sample."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (STEPS, SAMPLES, LENGTH + 1), generator=generator)
    keep = torch.tensor(KEEPING).roll(1)[None, :, None]
    mask = (torch.rand(STEPS, SAMPLES, LENGTH, generator=generator) < keep).float()
    return ids[..., :-1].contiguous(), ids[..., 1:].contiguous(), mask


def configuration(world_size: int, settings: dict[str, Any]) -> Config:
    base = {**BASE, "train_batch_size": SAMPLES, "gradient_clipping": CLIP}
    return resolve([], {**base, **settings}, Resources(world_size)).config


def micro_batches(config: Config, topology: Topology) -> Iterator[MicroBatch]:
    """The micro batches of this rank, step by step; ranks take turns, as the loader deals them."""
    micro = config.training.train_micro_batch_size_per_gpu or 0
    for tokens, labels, mask in zip(*samples(), strict=True):
        chunks = [MicroBatch(*parts) for parts in zip(*(x.split(micro) for x in (tokens, labels, mask)), strict=True)]
        yield from chunks[topology.data.rank :: topology.data.size]


def losses_and_norms(rank: int, world_size: int, settings: dict[str, Any]) -> list[tuple[float, float, float]]:
    """(loss, gradient norm, evaluation of the same samples after the update) of every step."""
    config = configuration(world_size, settings)
    topology = init_topology(config)
    engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY)
    train, evaluate = micro_batches(config, topology), micro_batches(config, topology)
    steps = []
    for _ in range(STEPS):
        result = engine.train_step(train, RATE)
        loss = eval_loss(engine, evaluate, config.training.gradient_accumulation_steps or 0)
        steps.append((float(result.loss), float(result.grad_norm), loss))
    return steps


@cache
def reference(*, tied: bool = False) -> list[tuple[float, float, float]]:
    """The same in float64, the whole batch at once."""
    config = configuration(1, {"no_weight_tying": not tied})
    model = SequentialModel(
        build_layer_specs(
            ModelSpec(
                config.model,
                config.initialization,
                config.kernels,
                padded_vocab_size=VOCABULARY,
                topology=Topology.single(),
                seed=config.training.seed,
                dtype=torch.float64,
            )
        )
    )
    section = config.optimizer
    groups = parameter_groups(model.parameters(), section.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=section.params["betas"], eps=section.params["eps"])
    steps = []
    for tokens, labels, mask in zip(*samples(), strict=True):
        loss = mean(model, tokens, labels, mask)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        with torch.no_grad():
            steps.append((loss.item(), norm.item(), mean(model, tokens, labels, mask).item()))
    return steps


def mean(model: SequentialModel, tokens: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """The mean loss of the unmasked tokens through torch's own cross entropy."""
    logits = model(tokens).transpose(0, 1)  # [b, s, v]
    counted = labels.masked_fill(mask == 0, -100)
    return F.cross_entropy(logits.flatten(0, 1), counted.flatten(), ignore_index=-100)


def test_the_masks_would_report() -> None:
    """The mean of micro batches' means is far from the mean over tokens."""
    config = configuration(1, {"gradient_accumulation_steps": 8})
    counts = [batch.loss_mask.sum().item() for batch in micro_batches(config, Topology.single())]
    assert 0 in counts
    assert max(counts) == LENGTH
    assert reference()[0][1] > CLIP


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_takes_the_mean_over_tokens(layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    expected = reference(tied=TIED.items() <= settings.items())
    for found in run_distributed(losses_and_norms, world_size, settings):
        for step, (got, target) in enumerate(zip(found, expected, strict=True)):
            assert got[0] == pytest.approx(target[0], rel=1e-6), f"loss of step {step}"
            assert got[1] == pytest.approx(target[1], rel=1e-5), f"gradient norm of step {step}"
            assert got[2] == pytest.approx(target[2], rel=1e-6), f"evaluation after step {step}"


@pytest.mark.parametrize("layout", [{}, {"pipe_parallel_size": 1}], ids=["plain", "pipeline"])
def test_bfloat16_takes_it_too(layout: dict[str, Any]) -> None:
    settings = {"precision": "bfloat16", "zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 4, **layout}
    for found in run_distributed(losses_and_norms, 2, settings):
        for got, target in zip(found, reference(), strict=True):
            assert got == pytest.approx(target, rel=5e-3)


@pytest.mark.parametrize(("mask", "divisor", "learns"), [([0, 1, 1], 2.0, True), ([0, 0, 0], 1.0, False)])
def test_a_step_says_whether_it_has_a_token_to_learn(mask: list[float], divisor: float, learns: bool) -> None:
    ids = torch.zeros(1, 3, dtype=torch.long)
    batch = MicroBatch(ids, ids, torch.tensor([mask], dtype=torch.float32))
    found, has_any = loss_divisor([batch], Topology.single(), "cpu")
    assert (float(found), bool(has_any)) == (divisor, learns)
