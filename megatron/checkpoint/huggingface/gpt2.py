"""GPT-2: `GPT2LMHeadModel`. Its matrices are [in, out], and the fused projection has all queries, keys, values."""

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

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"}
"""Ours -> theirs."""
_BACK = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    expected = {"norm": "layernorm", "pos_emb": "learned", "gpt_j_residual": False, "use_bias_in_norms": True}
    expected |= {"use_bias_in_attn_linear": True, "use_bias_in_mlp": True, "num_kv_heads": model.num_attention_heads}
    expected |= {"sliding_window_width": None, "opt_pos_emb_offset": 0, "use_qk_layernorm": False}
    errors = unlike(model, expected, "GPT-2") + special_attention(model, "GPT-2")
    if model.activation not in ACTIVATIONS:
        errors.append(ConfigIssue("transformers has no such activation", key="activation", value=model.activation))
    dims = ModelDims.of(model)
    if dims.head_dim * dims.num_attention_heads != dims.hidden_size:
        errors.append(ConfigIssue("a GPT-2 model has hidden_size / heads", key="kv_channels", value=model.kv_channels))
    return errors


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return {
        "vocab_size": padded_vocab_size,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": model.mlp_width,
        "n_positions": model.max_position_embeddings,
        "n_ctx": model.max_position_embeddings,  # transformers reads it no more, other programs do
        "activation_function": ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.layernorm_epsilon,
        "attn_pdrop": model.attention_dropout,
        "embd_pdrop": model.hidden_dropout,
        "resid_pdrop": model.hidden_dropout,
        "tie_word_embeddings": not model.no_weight_tying,
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    check_config(
        theirs, {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    )
    return {
        "num_layers": theirs["n_layer"],
        "hidden_size": theirs["n_embd"],
        "num_attention_heads": theirs["n_head"],
        "intermediate_size": theirs["n_inner"] or 4 * theirs["n_embd"],
        "activation": choose(_BACK, theirs, "activation_function"),
        "max_position_embeddings": theirs["n_positions"],
        "norm": "layernorm",
        "layernorm_epsilon": float(theirs["layer_norm_epsilon"]),
        "pos_emb": "learned",
        "no_weight_tying": not theirs["tie_word_embeddings"],
    }


NAMES = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    block="transformer.h.{}.",
    input_norm="ln_1",
    attention=("attn.c_attn",),
    by_head=False,
    dense="attn.c_proj",
    mlp_norm="ln_2",
    linear1=("mlp.c_fc",),
    linear2="mlp.c_proj",
    final_norm="transformer.ln_f",
    head="lm_head",
    matrices_turned=True,
)


GPT2 = ModelFamily(
    name="gpt2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=NAMES.table,
    spare=(".attn.bias", ".attn.masked_bias"),
    prefix="transformer.",
)
