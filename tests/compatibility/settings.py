"""Twelve training configurations that together use every layout, precision and kind of block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.end_to_end.runs import BASE as SMALL

STEPS = 6
RESUMED_AT = 3

BASE: dict[str, Any] = {
    **SMALL,
    "num_layers": 2,
    "train_iters": STEPS,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "eval_interval": RESUMED_AT,
    "eval_iters": 1,
    "checkpoint_factor": RESUMED_AT,
    "fingerprint_interval": 1,
}


@dataclass(frozen=True)
class Setting:
    """One configuration."""

    ranks: int
    """Processes that train it."""
    keys: dict[str, Any] = field(default_factory=dict)
    """What it sets beside BASE."""


def _zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


RESUMED = "tensor, pipeline, bf16, ZeRO 1"
"""Also trained in two halves, the second from the checkpoint of the first."""

SETTINGS: dict[str, Setting] = {
    "one rank": Setting(1, {"checkpoint_activations": True, "gradient_accumulation_steps": 2}),
    "tensor and sequence parallel": Setting(2, {"model_parallel_size": 2, "sequence_parallel": True}),
    "pipeline": Setting(2, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4, "no_weight_tying": False}),
    "tensor, pipeline, bf16, ZeRO 1": Setting(
        4, {"model_parallel_size": 2, "pipe_parallel_size": 2, "precision": "bfloat16", **_zero(1)}
    ),
    "ZeRO 2, bf16": Setting(2, {"precision": "bfloat16", **_zero(2)}),
    "ZeRO 3": Setting(2, {"norm": "layernorm", "activation": "gelu", "pos_emb": "learned", **_zero(3)}),
    "context parallel": Setting(2, {"context_parallel_size": 2, "pos_emb": "alibi", "num_kv_heads": 4}),
    "experts": Setting(
        2, {"moe_num_experts": 4, "moe_top_k": 2, "moe_expert_parallel_size": 2, "moe_aux_loss_coeff": 0.01, **_zero(1)}
    ),
    "mamba and attention": Setting(2, {"attention_config": ["mamba", "global"], **_zero(1)}),
    "rwkv": Setting(
        1,
        {
            "attention_config": ["rwkv", "rwkv"],
            "pos_emb": "none",
            "num_kv_heads": None,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "LoRA": Setting(2, {"lora": {"rank": 4, "alpha": 16, "targets": "all"}, "model_parallel_size": 2}),
    "Muon, wsd": Setting(
        2,
        {
            "optimizer": {"type": "Muon", "params": {"lr": 1.0e-3}},
            "model_parallel_size": 2,
            "lr_decay_style": "wsd",
            "wsd_decay_fraction": 0.5,
            "pos_emb": "sinusoidal",
        },
    ),
}
