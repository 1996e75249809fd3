"""A masked language model on every layout trains as one process does: losses of tokens and of the order, gradients.

One batch of four padded samples with two segments, three steps. 1e-5 for losses, 1e-4 for the norm of gradients, which
sums squares in another order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.config import Config, Resources, resolve
from megatron.data.dataset.batch import MicroBatch
from megatron.data.dataset.document_starts import document_starts
from megatron.distributed.init import init_distributed
from megatron.engine.builder import build_training_engine
from tests.multi_rank import run_cases

VOCABULARY, LENGTH, STEPS = 64, 24, 3
Keys = dict[str, Any]
Curve = list[tuple[float, float, float]]
BASE: Keys = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": LENGTH,
    "pos_emb": "learned",
    "train_impl": "bert",
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
MODERN = {
    "pos_emb": "rotary",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "mlp_multiple_of": 8,
    "bert_binary_head": False,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "num_kv_heads": 2,
}
LAYOUTS: dict[str, Keys] = {
    "tensor": {"model_parallel_size": 2},
    "tensor, sequence": {"model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2},
    "interleaved": {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4, "pipe_schedule": "interleaved"},
    "dualpipev": {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4, "pipe_schedule": "dualpipev"},
    "data": {},
    "data, ZeRO 1": {"zero_optimization": {"stage": 1}},
    "data, ZeRO 3": {"zero_optimization": {"stage": 3}},
    "recompute": {"checkpoint_activations": True, "gradient_accumulation_steps": 2},
    "attention recomputed": {"recompute_granularity": "selective"},
}


def samples() -> dict[str, torch.Tensor]:
    """Four samples; in each as many tokens are predicted, so that parts of the batch have equal weights."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, VOCABULARY, (4, LENGTH), generator=generator)
    lengths = torch.tensor([24, 20, 11, 16])
    mask, borders = torch.zeros(4, LENGTH), torch.zeros(4, LENGTH, dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        mask[row, torch.randperm(length, generator=generator)[: 3 + row % 2]] = 1
        borders[row, length % LENGTH] = True
    return {
        "tokens": tokens,
        "labels": torch.randint(0, VOCABULARY, (4, LENGTH), generator=generator) * mask.long(),
        "loss_mask": mask,
        "document_starts": document_starts(tokens, borders, None),
        "token_types": (torch.arange(LENGTH).expand(4, -1) >= 7).long(),
        "sentence_order": torch.tensor([[0], [1], [1], [0]]),
    }


def train(
    rank: int, world_size: int, model: dict[str, Any], layout: dict[str, Any]
) -> list[tuple[float, float, float]]:
    """Loss of tokens, loss of the order and gradient norm of each step, and those of an evaluation at the end."""
    config: Config = resolve([], {**BASE, **model, **layout}, Resources(world_size)).config
    axes = config.parallelism
    topology = init_distributed(
        pipe_parallel_size=axes.pipe_parallel_size,
        model_parallel_size=axes.model_parallel_size,
        sequence_parallel=axes.sequence_parallel,
        seed=1,
        backend="gloo",
    )
    given = samples()
    if not config.model.bert_binary_head:
        del given["token_types"], given["sentence_order"]
    engine = build_training_engine(config, topology, padded_vocab_size=VOCABULARY)
    mine = {name: each.chunk(topology.data.size)[topology.data.rank] for name, each in given.items()}
    count = config.training.gradient_accumulation_steps or 1
    batches = [MicroBatch(**{name: each.chunk(count)[part] for name, each in mine.items()}) for part in range(count)]
    found = []
    for _ in range(STEPS):
        result = engine.train_step(iter(batches), 1e-3)
        found.append((float(result.loss), float(result.more.get("sop_loss", 0)), float(result.grad_norm)))
    loss, tokens = engine.eval_sums(iter(batches), count)
    return [*found, (loss / tokens, engine.take_loss_parts().get("sop_loss", 0.0), tokens)]


@pytest.fixture(scope="module")
def one_process() -> dict[str, Curve]:
    cases = {"bert": (train, {}, {}), "modern": (train, MODERN, {})}
    return {name: ranks[0] for name, ranks in run_cases(cases, 1).items()}


def test_layouts_train_as_one_process_does(one_process: dict[str, Curve]) -> None:
    cases = {("bert", name): (train, {}, layout) for name, layout in LAYOUTS.items()}
    cases |= {("modern", name): (train, MODERN, LAYOUTS[name]) for name in ("tensor, sequence", "pipeline", "data")}
    assert one_process["bert"][0][1] > 0.3
    for (model, name), ranks in run_cases(cases, 2).items():
        for found in ranks:
            for step, (here, there) in enumerate(zip(found, one_process[model], strict=True)):
                what = f"{model}, {name}, step {step}"
                assert here[:2] == pytest.approx(there[:2], rel=1e-5, abs=1e-7), what
                assert here[2] == pytest.approx(there[2], rel=1e-4), what


def test_bfloat16_stays_near(one_process: dict[str, Curve]) -> None:
    (found,) = run_cases({"bf16": (train, {"precision": "bfloat16"}, {})}, 1)["bf16"]
    for here, there in zip(found, one_process["bert"], strict=True):
        assert here[:2] == pytest.approx(there[:2], rel=2e-2)
