"""Configurations of families with experts drawn at random, on top of those of a LLaMA."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Settings = dict[str, Any]


def rarely(chance: random.Random, seldom: Any, mostly: Any) -> Any:
    """What is not to be had here in one configuration of ten."""
    return seldom if chance.random() < 0.1 else mostly


def experts(chance: random.Random, llama: Settings, key: str, **further: Any) -> Settings:
    found = {**llama, "moe_intermediate_size": chance.choice([8, 12]), **further}
    del found["mlp_bias"]
    count = chance.choice([4, 8])
    names = [key, "num_experts", "num_local_experts"]
    found |= {rarely(chance, chance.choice(names), key): count, "num_experts_per_tok": chance.choice([2, 3])}
    return found | {"norm_topk_prob": chance.random() < 0.5, "pad_token_id": None}


def sparse(chance: random.Random, layers: int) -> Settings:
    found: Settings = {"use_sliding_window": rarely(chance, True, False)}
    if chance.random() < 0.5:
        found["mlp_only_layers"] = [layer for layer in range(layers) if chance.random() < 0.3]
    return found | ({"decoder_sparse_step": chance.choice([1, 2])} if chance.random() < 0.5 else {})


def qwen2_moe(chance: random.Random, llama: Settings) -> Settings:
    found = experts(chance, llama, "num_experts", shared_expert_intermediate_size=chance.choice([8, 24]))
    del found["attention_bias"]
    found["qkv_bias"] = chance.random() < 0.7
    return found | sparse(chance, found["num_hidden_layers"])


def qwen3_moe(chance: random.Random, llama: Settings) -> Settings:
    found = experts(chance, llama, chance.choice(["num_experts", "num_local_experts"]))
    return found | sparse(chance, found["num_hidden_layers"])


def olmoe(chance: random.Random, llama: Settings) -> Settings:
    found = experts(chance, llama, "num_experts")
    del found["moe_intermediate_size"]
    found.pop("head_dim", None)
    return found | {"clip_qkv": rarely(chance, 1.0, None)}


def glm4_moe(chance: random.Random, llama: Settings) -> Settings:
    found = experts(chance, llama, "n_routed_experts")
    groups = chance.choice([1, 1, 2])
    found |= {"n_group": groups, "topk_group": chance.choice([1, groups]), "num_experts_per_tok": 2}
    found |= {"routed_scaling_factor": chance.choice([1.0, 2.5]), "n_shared_experts": chance.choice([1, 2])}
    found["first_k_dense_replace"] = chance.choice([0, 1])
    block = found.get("rope_parameters") or {}
    if "partial_rotary_factor" not in block and chance.random() < 0.5:
        found["partial_rotary_factor"] = chance.choice([0.5, 1.0])
    return found | {"use_qk_norm": chance.random() < 0.5}


MIXTURES: dict[str, Callable[[random.Random, Settings], Settings]] = {
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "glm4_moe": glm4_moe,
}
"""model_type -> draws a config.json, given that of a LLaMA."""
