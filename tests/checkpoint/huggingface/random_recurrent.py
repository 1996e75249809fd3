"""Configurations of families with recurrent blocks drawn at random."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.checkpoint.huggingface.random_mixtures import Settings, rarely


def mamba(chance: random.Random) -> Settings:
    return {
        "vocab_size": 48,
        "hidden_size": chance.choice([16, 24, 32]),
        "num_hidden_layers": chance.choice([1, 2]),
        "state_size": rarely(chance, 8, 16),
        "time_step_rank": rarely(chance, 3, "auto"),
        "expand": rarely(chance, 3, 2),
        "use_conv_bias": chance.random() < 0.5,
        "use_bias": rarely(chance, True, False),
        "hidden_act": rarely(chance, "gelu", "silu"),
        "tie_word_embeddings": chance.random() < 0.6,
    }


def mamba2(chance: random.Random) -> Settings:
    heads, width, expand = chance.choice([2, 4]), chance.choice([8, 12]), chance.choice([1, 2])
    found = {
        "vocab_size": 48,
        "hidden_size": heads * width // expand,
        "num_hidden_layers": chance.choice([1, 2]),
        "num_heads": heads,
        "head_dim": width,
        "expand": rarely(chance, 3, expand),
        "state_size": chance.choice([8, 12]),
        "n_groups": chance.choice([1, 2]),
        "conv_kernel": rarely(chance, 3, 4),
        "use_conv_bias": chance.random() < 0.5,
        "use_bias": chance.random() < 0.5,
        "hidden_act": rarely(chance, "gelu", "silu"),
        "chunk_size": chance.choice([8, 256]),
        "tie_word_embeddings": chance.random() < 0.6,
    }
    limits = chance.choice(
        [None, [0.0, float("inf")], [0.01, float("inf")], [0.01, 0.3], [0.2, {"__float__": "Infinity"}]]
    )
    return found if limits is None else found | {"time_step_limit": limits}


def nemotron_h(chance: random.Random) -> Settings:
    """Blocks of every kind by either key, experts in groups."""
    kinds = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
    pattern = "".join(chance.choice("M*-E") for _ in range(chance.choice([1, 3, 4])))
    groups = chance.choice([1, 2])
    found: Settings = {
        "vocab_size": 48,
        "hidden_size": chance.choice([16, 32]),
        "num_attention_heads": 4,
        "num_key_value_heads": chance.choice([1, 4]),
        "head_dim": chance.choice([8, 12]),
        "intermediate_size": chance.choice([24, 40]),
        "mlp_hidden_act": chance.choice(["relu2", "gelu", "silu"]),
        "mlp_bias": rarely(chance, True, False),
        "attention_bias": rarely(chance, True, False),
        "sliding_window": rarely(chance, 4, None),
        "mamba_num_heads": 4,
        "mamba_head_dim": chance.choice([6, 8]),
        "ssm_state_size": chance.choice([8, 12]),
        "n_groups": chance.choice([1, 2]),
        "use_bias": chance.random() < 0.3,
        "use_conv_bias": chance.random() < 0.5,
        "time_step_min": chance.choice([0.001, 0.1, 0.3]),
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": chance.choice([8, 12]),
        "moe_shared_expert_intermediate_size": chance.choice([8, 24]),
        "moe_latent_size": rarely(chance, 8, None),
        "routed_scaling_factor": chance.choice([1.0, 2.5]),
        "n_group": groups,
        "topk_group": chance.choice([1, groups]),
        "norm_topk_prob": chance.random() < 0.7,
        "tie_word_embeddings": rarely(chance, True, False),
        "max_position_embeddings": 32,
        "pad_token_id": None,
    }
    if chance.random() < 0.3:
        found["time_step_limit"] = chance.choice([[0.0, float("inf")], [0.2, float("inf")]])
    if chance.random() < 0.3:
        found["mamba_n_groups"] = chance.choice([1, 4])
    spelling = chance.choice(["pattern", "pattern", "types", "older types", "both"])
    if spelling != "pattern":
        found["layers_block_type"] = [kinds[letter] for letter in pattern]
    if spelling == "older types":
        older = {"linear_attention": "mamba", "full_attention": "attention"}
        found["layers_block_type"] = [older.get(kind, kind) for kind in found["layers_block_type"]]
    return found | ({"hybrid_override_pattern": pattern} if spelling in ("pattern", "both") else {})


RECURRENT: dict[str, Callable[[random.Random], Settings]] = {"mamba": mamba, "mamba2": mamba2, "nemotron_h": nemotron_h}
"""model_type -> draws a config.json."""
