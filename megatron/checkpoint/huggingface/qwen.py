"""Qwen2, Qwen2.5 and Qwen3: `Qwen2ForCausalLM`, `Qwen3ForCausalLM`.

LLaMA's blocks; Qwen2 has biases of queries, keys and values, Qwen3 a norm of each head. Blocks from `max_window_layers`
on may have a window, or those that `layer_types` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.checkpoint.huggingface.family import QKV_BIAS, ModelFamily, Settings, unlike
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_misfits, decoder_settings
from megatron.checkpoint.huggingface.sliding_window import (
    FULL,
    SLIDING,
    kinds_of,
    one_window,
    window_misfits,
    window_of,
)
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigIssue


def _qwen2_misfits(model: ModelSection) -> list[ConfigIssue]:
    others = {"use_bias_in_mlp": False, "use_qk_layernorm": False, "use_bias_in_attn_linear": False, QKV_BIAS: True}
    return decoder_misfits(model, "Qwen2", **others) + window_misfits(model, "Qwen2")


def _qwen3_misfits(model: ModelSection) -> list[ConfigIssue]:
    expected = {"use_bias_in_mlp": False, "use_qk_layernorm": True}
    return decoder_misfits(model) + unlike(model, expected, "Qwen3") + window_misfits(model, "Qwen3")


def _windows(model: ModelSection) -> Settings:
    window = window_of(model)
    found = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    if not model.layer_types:
        return found
    kinds = kinds_of(model)
    first = kinds.index(SLIDING) if SLIDING in kinds else len(kinds)
    return found | {"max_window_layers": first, "layer_types": kinds}


def _qwen2_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return decoder_config(model, padded_vocab_size) | _windows(model)


def _qwen3_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return _qwen2_config(model, padded_vocab_size) | {"attention_bias": model.use_bias_in_attn_linear}


def _settings(theirs: Mapping[str, Any]) -> Settings:
    window = theirs["sliding_window"] if theirs["use_sliding_window"] else None
    layers = theirs["num_hidden_layers"]
    first = layers if window is None else theirs["max_window_layers"]
    kinds = theirs.get("layer_types") or [SLIDING if layer >= first else FULL for layer in range(layers)]
    found = one_window({**theirs, "layer_types": kinds}, window, kinds)
    return decoder_settings({**theirs, "mlp_bias": False}) | found


def _qwen2_settings(theirs: Mapping[str, Any]) -> Settings:
    """Their projections have the biases that they have, whatever config.json says."""
    return _settings({**theirs, "attention_bias": False}) | {QKV_BIAS: True}


def _qwen3_settings(theirs: Mapping[str, Any]) -> Settings:
    return _settings(theirs) | {"use_qk_layernorm": True}


QWEN2 = ModelFamily(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    misfits=_qwen2_misfits,
    config=_qwen2_config,
    settings=_qwen2_settings,
    table=NAMES.table,
    spare=(".rotary_emb.inv_freq",),
    parts=frozenset({QKV_BIAS, "layer_types"}),
    prefix="model.",
)
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
QWEN3 = ModelFamily(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    misfits=_qwen3_misfits,
    config=_qwen3_config,
    settings=_qwen3_settings,
    table=replace(NAMES, head_norms=HEAD_NORMS).table,
    spare=(".rotary_emb.inv_freq",),
    parts=frozenset({"layer_types"}),
    prefix="model.",
)
