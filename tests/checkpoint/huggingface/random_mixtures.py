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


def gated(chance: random.Random, llama: Settings) -> Settings:
    """Blocks of attention and gated delta nets; releases before 5 need one of each kind."""
    layers, heads = chance.choice([2, 3]), chance.choice([1, 2])
    found: Settings = {**llama, "num_hidden_layers": layers, "pad_token_id": None}
    found.pop("mlp_bias", None)
    found |= {"linear_num_key_heads": heads, "linear_num_value_heads": heads * chance.choice([1, 3])}
    found |= {"linear_key_head_dim": chance.choice([8, 12]), "linear_value_head_dim": chance.choice([8, 16])}
    found |= {"linear_conv_kernel_dim": chance.choice([2, 4]), "hidden_act": rarely(chance, "gelu", "silu")}
    if chance.random() < 0.5:
        other = rarely(chance, "sliding_attention", "full_attention")
        between = [chance.choice(["linear_attention", other]) for _ in range(layers - 2)]
        return found | {"layer_types": ["linear_attention", *between, "full_attention"]}
    return found | {"full_attention_interval": rarely(chance, 4, layers)}


def qwen3_next(chance: random.Random, llama: Settings) -> Settings:
    found = gated(chance, llama)
    found |= experts(chance, {**found, "mlp_bias": False}, "num_experts", **shared(chance))
    return {**found, **sparse(chance, found["num_hidden_layers"]), "use_sliding_window": False}


def qwen3_5_moe(chance: random.Random, llama: Settings) -> Settings:
    found = gated(chance, llama)
    found |= experts(chance, {**found, "mlp_bias": False}, "num_experts", **shared(chance))
    return {key: value for key, value in found.items() if key not in ("intermediate_size", "norm_topk_prob")}


def shared(chance: random.Random) -> Settings:
    return {"shared_expert_intermediate_size": chance.choice([8, 24])}


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


def deepseek(chance: random.Random, llama: Settings) -> Settings:
    found = experts(chance, llama, "n_routed_experts")
    for name in ("num_experts", "num_local_experts", "head_dim"):  # the last is always the rotated features
        found.pop(name, None)
    found |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": found["num_attention_heads"]}
    found |= {"q_lora_rank": chance.choice([None, 12]), "kv_lora_rank": chance.choice([8, 20])}
    found |= {"qk_nope_head_dim": chance.choice([4, 12]), "qk_rope_head_dim": chance.choice([4, 8])}
    found |= {"v_head_dim": chance.choice([8, 24]), "rms_norm_eps": rarely(chance, 1e-5, 1e-6)}
    groups = chance.choice([1, 2])
    found |= {"n_group": groups, "topk_group": chance.choice([1, groups]), "n_shared_experts": chance.choice([1, 2])}
    found |= {"routed_scaling_factor": chance.choice([1.0, 2.5]), "first_k_dense_replace": chance.choice([0, 1])}
    for name in ("rope_parameters", "rope_scaling"):
        block = found.get(name)
        if block and "yarn" in block.values() and chance.random() < 0.7:
            found[name] = {**block, "mscale": chance.choice([0.707, 1.0]), "mscale_all_dim": chance.choice([0.5, 1.0])}
    return found


def deepseek_v2(chance: random.Random, llama: Settings) -> Settings:
    found = deepseek(chance, llama)
    found["topk_method"] = chance.choice(["greedy", "group_limited_greedy"])
    return found | {"norm_topk_prob": rarely(chance, True, False)}


def deepseek_v3(chance: random.Random, llama: Settings) -> Settings:
    return deepseek(chance, llama) | {"rope_interleave": chance.random() < 0.7}


def gpt_oss(chance: random.Random, llama: Settings) -> Settings:
    found = experts(chance, llama, chance.choice(["num_experts", "num_local_experts"]))
    del found["moe_intermediate_size"], found["norm_topk_prob"]
    found |= {"hidden_act": "silu", "sliding_window": chance.choice([4, 1000])}
    found["swiglu_limit"] = rarely(chance, 3.0, 7.0)
    if chance.random() < 0.4:
        kinds = ["sliding_attention", "full_attention"]
        found["layer_types"] = [chance.choice(kinds) for _ in range(found["num_hidden_layers"])]
    return found


MIXTURES: dict[str, Callable[[random.Random, Settings], Settings]] = {
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "qwen3_5_text": gated,
    "qwen3_5_moe_text": qwen3_5_moe,
    "olmoe": olmoe,
    "glm4_moe": glm4_moe,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
}
"""model_type -> draws a config.json, given that of a LLaMA."""
