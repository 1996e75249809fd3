"""Trains small models step by step on one repeated batch, on any layout, and says how it went: for tests of options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.adapter_config import prompt_length
from megatron.checkpoint.load.loader import find_checkpoint
from megatron.checkpoint.save.saver import Counters, Saver
from megatron.config import Config, Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.init import init_distributed
from megatron.distributed.mesh import Topology
from megatron.engine.builder import build_training_engine
from megatron.param_table import ModelDims, tensors
from tests.options import LAYERS, Keys

VOCABULARY, LENGTH, STEPS, SAVED = 64, 24, 3, 1
BASE: Keys = {
    "num_layers": LAYERS,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": LENGTH,
    "max_position_embeddings": LENGTH,
    "pos_emb": "rotary",
    "vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": 1,
    "init_method_std": 0.1,
    "train_batch_size": 4,
    "train_iters": STEPS,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-3, "eps": 1.0e-6}},
    "precision": "fp32",
    "checkpoint_factor": 1,
    "distributed_backend": "gloo",
}
TENSOR: Keys = {"model_parallel_size": 2, "sequence_parallel": True}
PIPELINE: Keys = {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}
CONTEXT: Keys = {"context_parallel_size": 2, "zero_optimization": {"stage": 3}}
RING: Keys = {"context_parallel_size": 2, "context_parallel_method": "ring"}
Curves = dict[str, list[tuple[float, float]]]


def batches(config: Config, topology: Topology) -> list[MicroBatch]:
    """This rank's micro batches of the one global batch."""
    tokens = torch.randint(0, VOCABULARY, (4, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    mine = tokens.chunk(topology.data.size)[topology.data.rank]
    parts = mine.chunk(config.training.gradient_accumulation_steps or 1)
    made = [MicroBatch(part[:, :-1], part[:, 1:].contiguous(), torch.ones(part[:, 1:].shape)) for part in parts]
    prompt = prompt_length(config.model.soft_prompt_tuning)
    return [batch.first(LENGTH - prompt).behind(prompt) for batch in made] if prompt else made


def train(
    rank: int, world_size: int, cases: dict[str, Keys], layout: Keys, folder: str = "", resumed: bool = False
) -> Curves:
    """Loss and gradient norm of each step of each case. Saves after SAVED steps, or goes on from what is saved.

    folder: where TENSOR saves and others load; nothing is saved without it.
    """
    topology = None
    curves: Curves = {}
    for name, case in cases.items():
        position = str(Path(folder) / name)
        keys = {
            **BASE,
            **case,
            **layout,
            **({"save": position} if folder else {}),
            **({"load": position} if resumed else {}),
        }
        config = resolve([], keys, Resources(world_size)).config
        axes = config.parallelism
        topology = topology or init_distributed(
            pipe_parallel_size=axes.pipe_parallel_size,
            model_parallel_size=axes.model_parallel_size,
            context_parallel_size=axes.context_parallel_size,
            ulysses_size=axes.ulysses_size(config.model.num_kv_heads or 1),
            expert_parallel_size=config.moe.moe_expert_parallel_size,
            sequence_parallel=axes.sequence_parallel,
            seed=1,
            backend="gloo",
        )
        table = tensors(ModelDims.of(config.model, config.moe, config.mixers), VOCABULARY)
        checkpoint = find_checkpoint(config, table) if resumed else None
        engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY, checkpoint=checkpoint)
        if checkpoint is not None:
            state = checkpoint.optimizer()
            assert state is not None
            engine.load_optimizer(state)
        curves[name] = []
        for step in range(SAVED if resumed else 0, STEPS):
            result = engine.train_step(iter(batches(config, topology)), 1e-3)
            curves[name].append((float(result.loss), float(result.grad_norm)))
            if folder and layout == TENSOR and step + 1 == SAVED:
                Saver(config, engine, padded_vocab_size=VOCABULARY).save(Counters(SAVED, SAVED * 4))
    return curves


def agree(found: Curves, expected: Curves, *, norms: float = 1e-4) -> None:
    """1e-5 for the loss, and `norms` for the norm of gradients, which sums squares in another order."""
    for name, curve in expected.items():
        losses, lengths = ([pair[at] for pair in curve] for at in (0, 1))
        assert [pair[0] for pair in found[name]] == pytest.approx(losses, rel=1e-5), name
        assert [pair[1] for pair in found[name]] == pytest.approx(lengths, rel=norms), name
