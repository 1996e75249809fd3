"""Runs whose ranks share sequences by a ring, or by a ring across groups that exchange heads, train as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.config import Resources, resolve
from megatron.engine.builder import build_training_engine, init_topology
from tests.end_to_end.runs import BASE, make_documents, run, run_all, series
from tests.multi_rank import run_distributed

SHORT = {"train_iters": 3, "eval_interval": 3, "eval_iters": 1, "num_layers": 2, "save": None}
DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True}
MODELS: dict[str, dict[str, Any]] = {
    "one key head": {"num_kv_heads": 1},
    "documents": {
        "reset_attention_mask": True,
        "reset_position_ids": True,
        "eod_mask_loss": True,
        "sliding_window_width": 12,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
    },
    "learned": {"pos_emb": "learned", "no_weight_tying": False, "reset_position_ids": True, "norm": "layernorm"},
    "sinusoidal": {"pos_emb": "sinusoidal", "num_kv_heads": 4},
    "ALiBi": {"pos_emb": "alibi", "num_kv_heads": 4},
    "relative": {"pos_emb": "rpe"},
    "experts": {"moe_num_experts": 4, "moe_router_type": "topk"},
    "mamba": {"attention_config": [[["mamba", "global"], "all"]], "pos_emb": "none", "num_kv_heads": 2},
    "mamba, documents": {
        "attention_config": [[["mamba"], "all"]],
        "pos_emb": "none",
        "num_kv_heads": None,
        "reset_attention_mask": True,
    },
    "mamba2, documents": {
        "attention_config": [[["mamba2", "global"], "all"]],
        "mamba_head_dim": 16,
        "mamba_num_groups": 2,
        **DOCUMENTS,
    },
    "gated delta net, documents": {
        "attention_config": [[["gated_delta_net", "global"], "all"]],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        **DOCUMENTS,
    },
    "rwkv": {"attention_config": [[["rwkv", "global"], "all"]], "num_kv_heads": 1},
    "rwkv, documents": {"attention_config": [[["rwkv", "global"], "all"]], **DOCUMENTS},
}
RING, BOTH = (
    {"context_parallel_size": size, "context_parallel_method": name} for size, name in ((2, "ring"), (4, "both"))
)
TENSOR = {"model_parallel_size": 2, "sequence_parallel": True}
CASES: dict[tuple[int, str, str], dict[str, Any]] = {
    (2, "one key head", "ring 2"): RING,
    (2, "documents", "ring 2, ZeRO 3"): {**RING, "zero_optimization": {"stage": 3}},
    (2, "relative", "ring 2, core recomputed"): {**RING, "recompute_granularity": "selective"},
    (2, "ALiBi", "ring 2, recomputed, accumulation"): {
        **RING,
        "checkpoint_activations": True,
        "gradient_accumulation_steps": 2,
    },
    (2, "experts", "ring 2"): RING,
    (2, "mamba", "Ulysses 2, ZeRO 3"): {"context_parallel_size": 2, "zero_optimization": {"stage": 3}},
    (2, "rwkv", "ring 2"): RING,
    (2, "gated delta net, documents", "ring 2, recomputed"): {**RING, "checkpoint_activations": True},
    (2, "mamba, documents", "shards in order, recomputed"): {
        "context_parallel_size": 2,
        "checkpoint_activations": True,
    },
    (2, "mamba2, documents", "Ulysses 2, recomputed, ZeRO 1"): {
        "context_parallel_size": 2,
        "checkpoint_activations": True,
        "zero_optimization": {"stage": 1},
    },
    (4, "rwkv, documents", "both: two groups of 2"): BOTH,
    (4, "mamba", "ring 4"): {**RING, "context_parallel_size": 4},
    (4, "rwkv, documents", "ring 2, tensor 2, sequence"): {**RING, **TENSOR},
    (4, "mamba, documents", "Ulysses 2, pipeline 2"): {"context_parallel_size": 2, "pipe_parallel_size": 2},
    (4, "documents", "ring 2, pipeline 2"): {**RING, "pipe_parallel_size": 2, "gradient_accumulation_steps": 2},
    (4, "relative", "Ulysses 2, pipeline 2, ZeRO 1"): {
        "context_parallel_size": 2,
        "pipe_parallel_size": 2,
        "zero_optimization": {"stage": 1},
    },
    (4, "experts", "ring 2, pipeline 2, ZeRO 1"): {
        **RING,
        "pipe_parallel_size": 2,
        "zero_optimization": {"stage": 1},
    },
    (4, "one key head", "ring 4, one stage"): {**RING, "context_parallel_size": 4, "pipe_parallel_size": 1},
    (4, "one key head", "ring 4"): {**RING, "context_parallel_size": 4},
    (4, "documents", "both: two groups of 2"): BOTH,
    (4, "learned", "ring 2, tensor 2, sequence"): {**RING, **TENSOR},
    (4, "sinusoidal", "ring 2, tensor 2, sequence"): {**RING, **TENSOR},
    (4, "ALiBi", "ring 2, data 2, ZeRO 1"): {**RING, "zero_optimization": {"stage": 1}},
    (4, "learned", "both: two groups of 2"): BOTH,
}
Curves = dict[Any, list[dict[str, float]]]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Curves:
    """The records of every case, and of each model on one process."""
    folder = tmp_path_factory.mktemp("context")
    tokens, _ = make_documents(folder)
    keys = {"data_path": tokens, **SHORT}
    found: Curves = run_all(1, folder / "1", {name: {**keys, **model} for name, model in MODELS.items()})
    for ranks in (2, 4):
        cases = {case: {**keys, **MODELS[case[1]], **layout} for case, layout in CASES.items() if case[0] == ranks}
        found |= run_all(ranks, folder / str(ranks), cases)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_ring_trains_as_one_process(case: tuple[int, str, str], curves: Curves) -> None:
    one, several = curves[case[1]], curves[case]
    for name in ("train/lm_loss", "validation/lm_loss"):
        assert series(several, name) == pytest.approx(series(one, name), rel=1e-5), name
    assert series(several, "train/grad_norm") == pytest.approx(series(one, "train/grad_norm"), rel=1e-4)
    assert len(series(several, "train/lm_loss")) == SHORT["train_iters"]


def test_rings_and_states_go_with_several_stages_a_rank(tmp_path: Path) -> None:
    """Schedules in which a rank has two stages: documents over a ring, and Mamba's states beside one."""
    tokens, _ = make_documents(tmp_path)
    keys = {"data_path": tokens, **SHORT, "num_layers": 4}
    models = {"documents": "dualpipev", "mamba": "interleaved"}
    layout = {**RING, "pipe_parallel_size": 2, "gradient_accumulation_steps": 4}
    one = run_all(1, tmp_path / "1", {name: {**keys, **MODELS[name]} for name in models})
    cases = {name: {**keys, **MODELS[name], **layout, "pipe_schedule": order} for name, order in models.items()}
    for name, found in run_all(4, tmp_path / "4", cases).items():
        expected = series(one[name], "train/lm_loss")
        assert series(found, "train/lm_loss") == pytest.approx(expected, rel=1e-5), name


def logits(rank: int, world_size: int, layout: dict[str, Any]) -> Tensor:
    """Of a model of fixed seed, for prompts whose length no layout divides."""
    keys = {"num_layers": 2, "num_kv_heads": 1, "vocab_size": 64, **layout}
    config = resolve([], {**BASE, **keys}, Resources(world_size)).config
    engine = build_training_engine(config, init_topology(config), padded_vocab_size=64)
    tokens = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(2))
    return engine.logits(tokens)


@pytest.mark.parametrize(
    "layout", [{**RING, "model_parallel_size": 2, "sequence_parallel": True}, {**RING, "pipe_parallel_size": 2}]
)
def test_logits_are_in_the_order_of_the_sequence(layout: dict[str, Any]) -> None:
    (expected,) = run_distributed(logits, 1, {})
    for found in run_distributed(logits, 4, layout):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_with_another_method(dataset: str, tmp_path: Path) -> None:
    """Checkpoints do not depend on who shared the sequences: Ulysses, then a ring, then one process."""
    keys = {"data_path": dataset, **SHORT, "train_iters": 6, "extra_save_iters": [2, 4], "lr_decay_iters": 6}
    alone = run(1, tmp_path / "alone", **keys)
    stages: list[tuple[int, dict[str, Any]]] = [
        (2, {"context_parallel_size": 2}),
        (2, {**RING, "zero_optimization": {"stage": 1}}),
        (1, {}),
    ]
    losses: list[float] = []
    for number, (ranks, layout) in enumerate(stages):
        more = {"save": str(tmp_path / "save"), "train_iters": 2 * (number + 1)}
        more |= {"load": str(tmp_path / "save")} if number else {}
        losses += series(run(ranks, tmp_path / str(number), **{**keys, **layout, **more}), "train/lm_loss")
    assert losses == pytest.approx(series(alone, "train/lm_loss"), rel=1e-5)
