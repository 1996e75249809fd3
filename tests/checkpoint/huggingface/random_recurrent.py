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


RECURRENT: dict[str, Callable[[random.Random], Settings]] = {"mamba": mamba, "mamba2": mamba2}
"""model_type -> draws a config.json."""
