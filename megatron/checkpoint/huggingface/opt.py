"""OPT: `OPTForCausalLM` with norms before attention and MLP. Its learned positions begin at row 2 of their table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.family import (
    ModelFamily,
    Settings,
    check_config,
    choose,
    special_attention,
    unlike,
)
from megatron.checkpoint.huggingface.name_map import Names
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigIssue
from megatron.param_table import ModelDims

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu"}
"""Ours -> theirs."""
_BACK = {"relu": "relu", "gelu": "gelu", "silu": "silu"}
_OFFSET = 2


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    expected = {"norm": "layernorm", "pos_emb": "learned", "gpt_j_residual": False, "use_bias_in_norms": True}
    expected |= {"layernorm_epsilon": 1e-5, "num_kv_heads": model.num_attention_heads, "opt_pos_emb_offset": _OFFSET}
    expected |= {"sliding_window_width": None, "use_bias_in_mlp": model.use_bias_in_attn_linear}
    expected |= {"use_qk_layernorm": False}
    errors = unlike(model, expected, "OPT") + special_attention(model, "OPT")
    if model.activation not in ACTIVATIONS:
        errors.append(ConfigIssue("an OPT model has no such activation", key="activation", value=model.activation))
    dims = ModelDims.of(model)
    if dims.head_dim * dims.num_attention_heads != dims.hidden_size:
        errors.append(ConfigIssue("an OPT model has hidden_size / heads", key="kv_channels", value=model.kv_channels))
    return errors


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return {
        "vocab_size": padded_vocab_size,
        "hidden_size": model.hidden_size,
        "word_embed_proj_dim": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "ffn_dim": model.mlp_width,
        "max_position_embeddings": model.max_position_embeddings,
        "activation_function": ACTIVATIONS[model.activation],
        "do_layer_norm_before": True,
        "enable_bias": model.use_bias_in_attn_linear,
        "dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": not model.no_weight_tying,
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    check_config(theirs, {"do_layer_norm_before": True, "_remove_final_layer_norm": False})
    check_config(theirs, {"layer_norm_elementwise_affine": True, "word_embed_proj_dim": theirs["hidden_size"]})
    biases = bool(theirs["enable_bias"])
    return {
        "num_layers": theirs["num_hidden_layers"],
        "hidden_size": theirs["hidden_size"],
        "num_attention_heads": theirs["num_attention_heads"],
        "intermediate_size": theirs["ffn_dim"],
        "activation": choose(_BACK, theirs, "activation_function"),
        "max_position_embeddings": theirs["max_position_embeddings"],
        "norm": "layernorm",
        "layernorm_epsilon": 1e-5,
        "pos_emb": "learned",
        "opt_pos_emb_offset": _OFFSET,
        "use_bias_in_attn_linear": biases,
        "use_bias_in_mlp": biases,
        "no_weight_tying": not theirs["tie_word_embeddings"],
    }


NAMES = Names(
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    block="model.decoder.layers.{}.",
    input_norm="self_attn_layer_norm",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    dense="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    linear1=("fc1",),
    linear2="fc2",
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
)
OPT = ModelFamily(
    name="opt",
    model_type="opt",
    architecture="OPTForCausalLM",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=NAMES.table,
    prefix="model.",
)
