"""Granite 3: `GraniteForCausalLM`. LLaMA's blocks with factors of embeddings, scores, residual and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.family import ModelFamily, Settings
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_misfits, decoder_settings
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigIssue
from megatron.param_table import ModelDims


def _divisor(scale: float) -> float:
    """Returns the number that divides as the scale multiplies: the shortest whose inverse it is."""
    return next((found for found in (float(f"{1 / scale:.12g}"), 1 / scale) if 1 / found == scale), 1 / scale)


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    return decoder_misfits(model, "Granite", sliding_window_width=None, use_qk_layernorm=False)


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    usual = ModelDims.of(model).head_dim ** -0.5
    return decoder_config(model, padded_vocab_size) | {
        "attention_bias": model.use_bias_in_attn_linear,
        "mlp_bias": model.use_bias_in_mlp,
        "embedding_multiplier": model.embedding_multiplier,
        "residual_multiplier": model.residual_multiplier,
        "attention_multiplier": usual if model.softmax_scale is None else model.softmax_scale,
        "logits_scaling": _divisor(model.logit_scale),
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    return decoder_settings(theirs) | {
        "embedding_multiplier": float(theirs["embedding_multiplier"]),
        "residual_multiplier": float(theirs["residual_multiplier"]),
        "softmax_scale": float(theirs["attention_multiplier"]),
        "logit_scale": 1.0 / theirs["logits_scaling"],
    }


GRANITE = ModelFamily(
    name="granite",
    model_type="granite",
    architecture="GraniteForCausalLM",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=NAMES.table,
    spare=(".rotary_emb.inv_freq",),
    parts=frozenset({"embedding_multiplier", "residual_multiplier", "softmax_scale", "logit_scale"}),
    prefix="model.",
)
