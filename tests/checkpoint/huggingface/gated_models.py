"""Small models of transformers with gated delta nets, for the tests of models.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

_BLOCKS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "rms_norm_eps": 1e-3,  # with less the norm of heads magnifies rounding
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
    "rope_parameters": {"partial_rotary_factor": 0.25, "rope_type": "default", "rope_theta": 10000.0},
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
GATED_DENSE: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_5": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_BLOCKS, intermediate_size=88)),
}
"""Name -> makes the model."""
GATED_MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**_BLOCKS, **_EXPERTS)),
    "qwen3_5_moe": lambda: Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**_BLOCKS, **_EXPERTS)),
    "qwen3_next, biases, dense blocks, one kind": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **{**_BLOCKS, "num_hidden_layers": 2, "linear_num_value_heads": 2},
            **_EXPERTS,
            intermediate_size=88,
            layer_types=["linear_attention", "full_attention"],
            attention_bias=True,
            mlp_only_layers=[0],
            norm_topk_prob=False,
        )
    ),
}
"""Those with experts."""
