"""Phi-3 and Phi-4-mini: `Phi3ForCausalLM`. One matrix for queries, keys and values, one for both halves of the MLP.

Their scaling `longrope` takes one set of frequencies for texts up to the original length and another one beyond, for
all positions of a text; cached keys cannot change so, and it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.checkpoint.huggingface.family import ModelFamily, Settings, check_config
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_misfits, decoder_settings
from megatron.checkpoint.huggingface.rope_config import CONFIG, rotary_settings
from megatron.checkpoint.huggingface.sliding_window import FULL, SLIDING, one_window
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigError, ConfigIssue
from megatron.param_table import ModelDims


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    others = {"use_bias_in_attn_linear": False, "use_bias_in_mlp": False, "use_qk_layernorm": False}
    errors = decoder_misfits(model, "Phi-3", **others, rope_scaling=None, rotary_pct=model.rotary_pct)
    dims = ModelDims.of(model)
    if dims.query_size != dims.hidden_size:
        errors.append(ConfigIssue("a Phi-3 model has hidden_size / heads", key="kv_channels", value=dims.head_dim))
    return errors


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return decoder_config(model, padded_vocab_size) | {
        "partial_rotary_factor": model.rotary_pct,
        "original_max_position_embeddings": model.max_position_embeddings,
        "sliding_window": model.sliding_window_width,
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    check_config(theirs, {"resid_pdrop": 0.0, "embd_pdrop": 0.0})
    size = theirs["hidden_size"] // theirs["num_attention_heads"]
    check_config(theirs, {"head_dim": size})
    for key in ("rope_scaling", "rope_parameters"):
        block = theirs.get(key) or {}
        kind = block.get("rope_type") or block.get("type") or "default"
        if kind != "default":
            what = "longrope takes other frequencies by the length of each text, which cached keys cannot follow"
            raise ConfigError.of(what, key=key, value=block, location=CONFIG)
    rotary = rotary_settings({**theirs, "original_max_position_embeddings": None}, base="rope_theta")
    window = theirs["sliding_window"]
    found = one_window(theirs, window, [FULL if window is None else SLIDING] * theirs["num_hidden_layers"])
    return decoder_settings({**theirs, "attention_bias": False, "mlp_bias": False}, rotary) | found


PHI3 = ModelFamily(
    name="phi3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=replace(
        NAMES, attention=("self_attn.qkv_proj",), by_head=False, linear1=("mlp.gate_up_proj",), gate_first=True
    ).table,
    spare=(".rotary_emb.inv_freq",),
    class_pads=True,
    prefix="model.",
)
