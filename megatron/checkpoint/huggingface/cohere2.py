"""Command R7B: `Cohere2ForCausalLM`. Attention and MLP in parallel behind one norm without a bias, a factor of logits.

Blocks have a window and rotary positions, or neither. Their rotary positions turn neighbouring features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.checkpoint.huggingface.family import ModelFamily, Settings, check_config
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_misfits, decoder_settings
from megatron.checkpoint.huggingface.sliding_window import (
    FULL,
    SLIDING,
    kinds_of,
    listed_kinds,
    periodic_kinds,
    typed_blocks,
    window_misfits,
    window_of,
)
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigIssue
from megatron.param_table import ModelDims

USUAL_WINDOW = 4096
_OTHERS = {
    "norm": "layernorm",
    "gpt_j_residual": True,
    "gpt_j_tied": True,
    "use_bias_in_norms": False,
    "use_bias_in_mlp": False,
}


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    errors = decoder_misfits(model, "Cohere 2", **_OTHERS, use_qk_layernorm=False)
    errors += window_misfits(model, "Cohere 2", one_rope=False)
    own = (model.rotary_emb_base, model.rope_scaling)
    for block in model.block_options:
        windowed = block.sliding_window_width is not None
        if block.rotary != windowed or (block.rotary and (block.rotary_emb_base, block.rope_scaling) != own):
            what = "blocks of a Cohere 2 model have a window and the same rotary positions, or neither"
            errors.append(ConfigIssue(what, key="layer_types", value=model.layer_types))
            break
    dims = ModelDims.of(model)
    if dims.query_size != dims.hidden_size:
        errors.append(ConfigIssue("a Cohere 2 model has hidden_size / heads", key="kv_channels", value=dims.head_dim))
    return errors


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    settings = decoder_config(model, padded_vocab_size)
    del settings["rms_norm_eps"]
    return settings | {
        "layer_norm_eps": model.layernorm_epsilon,
        "attention_bias": model.use_bias_in_attn_linear,
        "logit_scale": model.logit_scale,
        "sliding_window": window_of(model) or USUAL_WINDOW,
        "layer_types": kinds_of(model),
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    check_config(theirs, {"head_dim": theirs["hidden_size"] // theirs["num_attention_heads"]})
    usual = periodic_kinds(theirs["num_hidden_layers"], theirs["sliding_window_pattern"] or 4)
    kinds = listed_kinds(theirs, usual)
    found = decoder_settings({**theirs, "mlp_bias": False}, epsilon=("layernorm_epsilon", "layer_norm_eps"))
    window = {"sliding_window_width": theirs["sliding_window"]}
    types = typed_blocks(kinds, {SLIDING: window, FULL: {"rotary": False}})
    return found | _OTHERS | {"logit_scale": float(theirs["logit_scale"])} | types


COHERE2 = ModelFamily(
    name="cohere2",
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=replace(NAMES, mlp_norm=None, norm_values=(("weight", "weight"),), pairs_interleaved=True).table,
    spare=(".rotary_emb.inv_freq",),
    parts=frozenset({"logit_scale", "layer_types"}),
    class_pads=True,
    prefix="model.",
)
