"""An encoder-decoder on every layout trains as one process does: losses and norms of gradients.

One batch of four samples whose sources and targets have different lengths, three steps. 1e-5 for losses, 1e-4 for the
norm of gradients, which sums squares in another order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.config import Config, Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.init import init_distributed
from megatron.engine.builder import build_training_engine
from tests.multi_rank import run_cases

VOCABULARY, SOURCE, TARGET, STEPS = 64, 24, 12, 3
Keys = dict[str, Any]
Curve = list[tuple[float, float]]
BASE: Keys = {
    "encoder_num_layers": 2,
    "decoder_num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "encoder_seq_length": SOURCE,
    "decoder_seq_length": TARGET,
    "pos_emb": "learned",
    "train_impl": "t5",
    "mask_prob": 0.1,
    "pack_impl": "unpacked",
    "vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": 1,
    "init_method_std": 0.1,
    "train_batch_size": 4,
    "train_iters": STEPS,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0e-3, "eps": 1.0e-6}},
    "precision": "fp32",
    "distributed_backend": "gloo",
}
PUBLIC: Keys = {
    "pos_emb": "relative",
    "rpe_num_buckets": 8,
    "norm": "rmsnorm",
    "activation": "geglu_tanh",
    "softmax_scale": 1.0,
    "no_weight_tying": True,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "num_kv_heads": 2,
    "mlp_multiple_of": 8,
}
LAYOUTS: dict[str, Keys] = {
    "tensor": {"model_parallel_size": 2},
    "tensor, sequence": {"model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2},
    "uneven pipeline": {
        "pipe_parallel_size": 2,
        "gradient_accumulation_steps": 2,
        "pipe_partition_method": [1, 3],
    },
    "interleaved": {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4, "pipe_schedule": "interleaved"},
    "dualpipev": {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4, "pipe_schedule": "dualpipev"},
    "data": {},
    "data, ZeRO 1": {"zero_optimization": {"stage": 1}},
    "data, ZeRO 3": {"zero_optimization": {"stage": 3}},
    "recompute": {"checkpoint_activations": True, "gradient_accumulation_steps": 2},
    "attention recomputed": {"recompute_granularity": "selective"},
}


def samples() -> dict[str, torch.Tensor]:
    """Four samples."""
    generator = torch.Generator().manual_seed(2)
    lengths, targets = torch.tensor([24, 20, 11, 16])[:, None], torch.tensor([12, 7, 9, 10])[:, None]
    starts = torch.where(torch.arange(SOURCE) < lengths, 0, lengths)
    mask = (torch.arange(TARGET) < targets).float()
    return {
        "tokens": torch.randint(1, VOCABULARY, (4, SOURCE + TARGET), generator=generator),
        "labels": torch.randint(0, VOCABULARY, (4, TARGET), generator=generator) * mask.long(),
        "loss_mask": mask,
        "document_starts": torch.cat((starts, torch.full((4, TARGET), SOURCE)), dim=1),
    }


def train(rank: int, world_size: int, model: Keys, layout: Keys) -> Curve:
    """Loss and gradient norm of each step, and sum and tokens of an evaluation at the end."""
    config: Config = resolve([], {**BASE, **model, **layout}, Resources(world_size)).config
    axes = config.parallelism
    topology = init_distributed(
        pipe_parallel_size=axes.pipe_parallel_size,
        model_parallel_size=axes.model_parallel_size,
        sequence_parallel=axes.sequence_parallel,
        seed=1,
        backend="gloo",
    )
    engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY)
    mine = {name: each.chunk(topology.data.size)[topology.data.rank] for name, each in samples().items()}
    count = config.training.gradient_accumulation_steps or 1
    batches = [MicroBatch(**{name: each.chunk(count)[part] for name, each in mine.items()}) for part in range(count)]
    found = []
    for _ in range(STEPS):
        result = engine.train_step(iter(batches), 1e-3)
        found.append((float(result.loss), float(result.grad_norm)))
    loss, tokens = engine.eval_sums(iter(batches), count)
    return [*found, (loss / tokens, tokens)]


@pytest.fixture(scope="module")
def one_process() -> dict[str, Curve]:
    cases = {"megatron": (train, {}, {}), "public": (train, PUBLIC, {})}
    return {name: ranks[0] for name, ranks in run_cases(cases, 1).items()}


def test_layouts_train_as_one_process_does(one_process: dict[str, Curve]) -> None:
    cases = {("megatron", name): (train, {}, layout) for name, layout in LAYOUTS.items()}
    alike = ("tensor, sequence", "pipeline", "interleaved", "data, ZeRO 3", "recompute")
    cases |= {("public", name): (train, PUBLIC, LAYOUTS[name]) for name in alike}
    assert one_process["public"][0][0] > one_process["public"][-1][0]
    for (model, name), ranks in run_cases(cases, 2).items():
        for found in ranks:
            for step, (here, there) in enumerate(zip(found, one_process[model], strict=True)):
                what = f"{model}, {name}, step {step}"
                assert here[0] == pytest.approx(there[0], rel=1e-5), what
                assert here[1] == pytest.approx(there[1], rel=1e-4), what


def test_bfloat16_stays_near(one_process: dict[str, Curve]) -> None:
    half = {"precision": "bfloat16"}
    cases = {"megatron": (train, half, {}), "public": (train, {**PUBLIC, **half}, {})}
    for name, (found,) in run_cases(cases, 1).items():
        for here, there in zip(found, one_process[name], strict=True):
            assert here[0] == pytest.approx(there[0], rel=2e-2)
