"""What the training objective decides of a model: its attention mask and its heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.config.derived.retrieval import RETRIEVAL
from megatron.config.derived.task import CLASSES
from megatron.registry import BIDIRECTIONAL, CAUSAL, CLASS_HEAD, LINEAR_HEAD, MASKED_HEAD, RETRIEVAL_HEAD

MASKED = "bert"
"""The objective whose model is an encoder."""
ENCODERS = {MASKED: MASKED_HEAD, CLASSES: CLASS_HEAD, **dict.fromkeys(RETRIEVAL, RETRIEVAL_HEAD)}
"""Objective of an encoder -> its head."""
CONVERSION = "convert_from_hf.py"
"""The script that imports a model, which for an encoder no other script without training does."""
ENCODER_KEYS = ("attention_mask", "lm_head", "bert_binary_head", "num_token_types")


def derive_encoder(train_impl: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of ENCODER_KEYS.

    train_impl: the objective. given: the values of ENCODER_KEYS, None where they are left out.
    """
    masked, encodes = train_impl == MASKED, train_impl in ENCODERS
    usual = {
        "attention_mask": BIDIRECTIONAL if encodes else CAUSAL,
        "lm_head": ENCODERS.get(train_impl, LINEAR_HEAD),
        "bert_binary_head": masked,
    }
    found = {name: value if given[name] is None else given[name] for name, value in usual.items()}
    types = given["num_token_types"]
    if types is None:
        types = 2 if found["bert_binary_head"] or (encodes and not masked) else 0
    return {**found, "num_token_types": types}
