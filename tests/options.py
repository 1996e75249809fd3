"""The options of the families that every block is made of, as keys of the configuration, for conformance tests.

A member that is not here is found by `tests/model/test_options.py`, which compares with the registry.
"""

from __future__ import annotations

from typing import Any

from megatron.block_sparsity import SPARSE_KINDS
from megatron.registry import ACTIVATIONS, NORMS, POSITIONS

LAYERS = 2
Keys = dict[str, Any]

_ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": 16}
POSITION_CASES: dict[str, Keys] = {
    "learned": {"pos_emb": "learned"},
    "learned, offset": {"pos_emb": "learned", "opt_pos_emb_offset": 2},
    "sinusoidal": {"pos_emb": "sinusoidal"},
    "rotary": {"pos_emb": "rotary", "rotary_pct": 0.5},
    "rotary, linear": {"pos_emb": "rotary", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "rotary, dynamic": {"pos_emb": "rotary", "rope_scaling": {"type": "dynamic", **_ORIGINAL}},
    "rotary, yarn": {"pos_emb": "rotary", "rope_scaling": {"type": "yarn", **_ORIGINAL}},
    "rotary, llama3": {"pos_emb": "rotary", "rope_scaling": {"type": "llama3", **_ORIGINAL}},
    "rpe": {"pos_emb": "rpe", "rpe_num_buckets": 8, "rpe_max_distance": 24},
    "rpe, grouped": {"pos_emb": "rpe", "rpe_num_buckets": 8, "rpe_max_distance": 24, "num_kv_heads": 2},
    "alibi": {"pos_emb": "alibi"},
    "none": {"pos_emb": "none"},
}

NORM_CASES: dict[str, Keys] = {
    **{name: {"norm": name} for name in NORMS.names if not name.startswith("te_")},
    "layernorm without bias": {"norm": "layernorm", "use_bias_in_norms": False},
    **{
        f"{name}, queries and keys": {"norm": name, "use_qk_layernorm": True, "num_kv_heads": 2}
        for name in NORMS.names
        if not name.startswith("te_")
    },
}

_FORMS: tuple[Keys, ...] = (
    {},
    {"gpt_j_residual": True, "use_bias_in_mlp": False},
    {"gpt_j_residual": True, "gpt_j_tied": True, "use_bias_in_attn_linear": False},
    {"no_weight_tying": True, "num_kv_heads": 1, "kv_channels": 24},
)
ACTIVATION_CASES: dict[str, Keys] = {
    name: {"activation": name, "intermediate_size": 200, "mlp_multiple_of": 4, **_FORMS[number % len(_FORMS)]}
    for number, name in enumerate(ACTIVATIONS.names)
}
"""Each with a form of the residual, biases or heads; 200 is no multiple of 3."""

ATTENTION_CASES: dict[str, Keys] = {
    "global": {"attention_config": ["global"] * LAYERS},
    "flash": {"attention_config": ["flash"] * LAYERS},
    "sliding window": {"sliding_window_width": 5, "num_kv_heads": 2},
    "local": {"attention_config": ["local"] * LAYERS, "sparsity_config": {"block": 4, "num_local_blocks": 2}},
    "sparse_fixed": {
        "attention_config": ["sparse_fixed"] * LAYERS,
        "sparsity_config": {
            "block": 4,
            "num_local_blocks": 2,
            "num_different_global_patterns": 2,
            "different_layout_per_head": True,
        },
    },
    "sparse_variable": {
        "attention_config": ["sparse_variable", "global"],
        "sparsity_config": {"block": 4, "local_window_blocks": [1, 2], "num_random_blocks": 1},
    },
    "bigbird": {
        "attention_config": ["bigbird"] * LAYERS,
        "sparsity_config": {"block": 4, "different_layout_per_head": True, "num_sliding_window_blocks": 2},
        "pos_emb": "alibi",
    },
    "bslongformer": {
        "attention_config": ["bslongformer", "local"],
        "sparsity_config": {"block": 4, "num_sliding_window_blocks": 2},
        "num_kv_heads": 2,
        "pos_emb": "rpe",
    },
}

_TYPES = {
    "sliding": {"sliding_window_width": 5, "rotary_emb_base": 100},
    "full": {"rope_scaling": {"type": "yarn", **_ORIGINAL}},
    "nope": {"rotary": False},
}
PART_CASES: dict[str, Keys] = {
    "biases of queries, keys and values": {"add_qkv_bias": True, "use_bias_in_attn_linear": False},
    "norms of outputs": {"norm_placement": "output", "norm": "rmsnorm"},
    "norms on both sides": {"norm_placement": "sandwich", "norm": "rmsnorm_1p", "residual_multiplier": 0.5},
    "norms of sums": {"norm_placement": "post", "embedding_norm": True, "residual_multiplier": 0.5},
    "norms across heads": {
        "norm": "rmsnorm",
        "use_qk_layernorm": True,
        "qk_layernorm_across_heads": True,
        "num_kv_heads": 2,
    },
    "bounds": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window_width": 7},
    "bounds, own output layer": {"final_logit_softcapping": 3.0, "no_weight_tying": True, "pos_emb": "alibi"},
    "sinks": {"softmax_type": "learnable", "sliding_window_width": 7, "num_kv_heads": 2},
    "one more term, biased scores": {"softmax_type": "off-by-one", "pos_emb": "alibi", "gpt_j_residual": True},
    "value residual": {"value_residual": True, "num_kv_heads": 2, "pos_emb": "rotary"},
    "value residual, parallel": {
        "value_residual": True,
        "gpt_j_residual": True,
        "attention_config": ["local", "global"],
    },
    "output gate": {"attention_output_gate": True, "num_kv_heads": 2},
    "output gate, parallel": {"attention_output_gate": True, "gpt_j_residual": True, "add_qkv_bias": False},
    "bounded gates": {
        "activation": "quick_geglu",
        "activation_func_clamp_value": 0.02,
        "glu_linear_offset": 1.0,
        "mlp_multiple_of": 4,
    },
    "learned activation": {"activation": "xielu", "num_kv_heads": 2},
    "factors": {
        "scale_embeddings": True,
        "embedding_multiplier": 0.5,
        "residual_multiplier": 0.5,
        "logit_scale": 0.5,
        "softmax_scale": 0.1,
    },
    "types of blocks": {"layer_types": ["sliding", "full"], "layer_type_options": _TYPES},
    "types of blocks, no positions": {"layer_types": ["nope", "sliding"], "layer_type_options": _TYPES},
    "factors, parallel": {"gpt_j_residual": True, "residual_multiplier": 0.5, "logit_scale": 2.0},
}

_MSCALES = {"type": "yarn", **_ORIGINAL, "mscale": 0.707, "mscale_all_dim": 1.0}
LATENTS: Keys = {
    "multi_latent_attention": True,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 16,
    "norm": "rmsnorm",
    "use_bias_in_attn_linear": False,
    "no_weight_tying": True,
}
LATENT_CASES: dict[str, Keys] = {
    "latents": {**LATENTS, "q_lora_rank": 24, "rope_scaling": _MSCALES},
    "latents, wide values": {**LATENTS, "v_head_dim": 24, "use_bias_in_attn_linear": True, "sliding_window_width": 7},
    "latents, parallel": {**LATENTS, "qk_head_dim": 8, "gpt_j_residual": True, "attn_logit_softcapping": 2.0},
}

FAMILIES: dict[str, dict[str, Keys]] = {
    "positions": POSITION_CASES,
    "norms": NORM_CASES,
    "activations": ACTIVATION_CASES,
    "attention": ATTENTION_CASES,
    "parts": PART_CASES,
    "latents": LATENT_CASES,
}


def uncovered() -> list[str]:
    """Registered members that no case names.

    Norms that need a GPU are tested there, and `relative`, of two stacks, in tests/model/test_encoder_decoder.py.
    """
    named = {
        value
        for cases in FAMILIES.values()
        for keys in cases.values()
        for value in keys.values()
        if isinstance(value, str)
    }
    kinds = {kind for keys in ATTENTION_CASES.values() for kind in keys.get("attention_config", ())}
    positions = (name for name in POSITIONS.names if name != "relative")
    expected = [*positions, *(name for name in NORMS.names if not name.startswith("te_")), *ACTIVATIONS.names]
    return [name for name in expected if name not in named] + [
        kind for kind in ("global", "flash", *SPARSE_KINDS) if kind not in kinds
    ]
