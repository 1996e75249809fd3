"""What the training objective decides of a model: its attention mask and its heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.derived.task import CLASSES
from megatron.registry import BIDIRECTIONAL, CAUSAL, CLASS_HEAD, LINEAR_HEAD, MASKED_HEAD

MASKED = "bert"
"""The objective whose model is an encoder."""
CONVERSION = "convert_from_hf.py"
"""The script that imports a model, which for an encoder no other script without training does."""
ENCODER_KEYS = ("attention_mask", "lm_head", "bert_binary_head", "num_token_types")


def derive_encoder(train_impl: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of ENCODER_KEYS.

    train_impl: the objective. given: the values of ENCODER_KEYS, None where they are left out.
    """
    masked, classes = train_impl == MASKED, train_impl == CLASSES
    usual = {
        "attention_mask": BIDIRECTIONAL if masked or classes else CAUSAL,
        "lm_head": MASKED_HEAD if masked else CLASS_HEAD if classes else LINEAR_HEAD,
        "bert_binary_head": masked,
    }
    found = {name: value if given[name] is None else given[name] for name, value in usual.items()}
    types = given["num_token_types"]
    return {**found, "num_token_types": (2 if found["bert_binary_head"] or classes else 0) if types is None else types}
