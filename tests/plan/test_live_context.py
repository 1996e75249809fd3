"""What a rank holds in a training step where c ranks share sequences by a ring: a c-th of the activations.

The model is the one of configs/quickstart.yml, one sample a step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.multi_rank import run_distributed
from tests.plan.live import count

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yml"
VOCABULARY = 512
MODEL = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "pos_emb",
    "norm",
    "activation",
    "intermediate_size",
    "use_bias_in_attn_linear",
    "use_bias_in_mlp",
    "no_weight_tying",
    "precision",
)
STEP: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "train_iters": 2,
    "padded_vocab_size": VOCABULARY,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
}


def held(ranks: int, length: int, timeout: float = 120.0) -> dict[str, int]:
    """What rank 0 holds of each component [bytes] where ranks share sequences of length tokens."""
    quickstart = yaml.safe_load(QUICKSTART.read_text())
    settings = {key: quickstart[key] for key in MODEL} | STEP
    settings |= {"seq_length": length, "max_position_embeddings": length, "context_parallel_size": ranks}
    if ranks > 1:
        settings["context_parallel_method"] = "ring"
    first, *others = run_distributed(count, ranks, settings, VOCABULARY, timeout=timeout)
    assert all(other["activations"] == first["activations"] for other in others)
    return first


@pytest.mark.long
def test_activations_are_shared() -> None:
    """At most 1.1/c of one rank's, and no more than one rank's where the sequences are c times as long."""
    alone, two, four, longer = held(1, 512), held(2, 512), held(4, 512), held(4, 2048)
    assert two["activations"] <= 1.1 / 2 * alone["activations"]
    assert four["activations"] <= 1.1 / 4 * alone["activations"]
    assert longer["activations"] <= 1.1 * alone["activations"]


@pytest.mark.long
def test_a_step_of_32k_tokens_by_four_fits_where_8k_by_one_do() -> None:
    """All components together."""
    assert sum(held(4, 32768, timeout=1800).values()) <= sum(held(1, 8192, timeout=600).values())
