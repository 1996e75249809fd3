"""GPT-NeoX and Pythia: `GPTNeoXForCausalLM`. The rows of the fused projection stand as ours do, head by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.family import ModelFamily, Settings, choose, special_attention, unlike
from megatron.checkpoint.huggingface.name_map import Names
from megatron.checkpoint.huggingface.rope_config import rotary_settings, scaling_config, scaling_misfits
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigIssue
from megatron.param_table import ModelDims

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
}
"""Ours -> theirs."""
_BACK = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
THEIR_ACTIVATIONS = {**_BACK, "relu": "relu", "silu": "silu", "mish": "mish"}
"""Theirs -> ours."""


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    expected = {"norm": "layernorm", "pos_emb": "rotary", "use_bias_in_mlp": True, "use_bias_in_norms": True}
    expected |= {"num_kv_heads": model.num_attention_heads, "sliding_window_width": None, "use_qk_layernorm": False}
    errors = unlike(model, expected, "GPT-NeoX") + special_attention(model, "GPT-NeoX") + scaling_misfits(model)
    if model.activation not in ACTIVATIONS:
        errors.append(ConfigIssue("transformers has no such activation", key="activation", value=model.activation))
    dims = ModelDims.of(model)
    if dims.head_dim * dims.num_attention_heads != dims.hidden_size:
        errors.append(
            ConfigIssue("a GPT-NeoX model has hidden_size / heads", key="kv_channels", value=model.kv_channels)
        )
    return errors


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return {
        "vocab_size": padded_vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.mlp_width,
        "hidden_act": ACTIVATIONS[model.activation],
        "rotary_pct": model.rotary_pct,
        "rotary_emb_base": model.rotary_emb_base,
        "max_position_embeddings": model.max_position_embeddings,
        "layer_norm_eps": model.layernorm_epsilon,
        "use_parallel_residual": model.gpt_j_residual,
        "attention_bias": model.use_bias_in_attn_linear,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
        "tie_word_embeddings": not model.no_weight_tying,
        **scaling_config(model),
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    rotary = rotary_settings(theirs, base="rotary_emb_base", part="rotary_pct")
    return {
        "num_layers": theirs["num_hidden_layers"],
        "hidden_size": theirs["hidden_size"],
        "num_attention_heads": theirs["num_attention_heads"],
        "intermediate_size": theirs["intermediate_size"],
        "activation": choose(THEIR_ACTIVATIONS, theirs, "hidden_act"),
        "max_position_embeddings": theirs["max_position_embeddings"],
        "norm": "layernorm",
        "layernorm_epsilon": float(theirs["layer_norm_eps"]),
        "pos_emb": "rotary",
        **rotary,
        "gpt_j_residual": bool(theirs["use_parallel_residual"]),
        "use_bias_in_attn_linear": bool(theirs["attention_bias"]),
        "no_weight_tying": not theirs["tie_word_embeddings"],
    }


NAMES = Names(
    embedding="gpt_neox.embed_in",
    block="gpt_neox.layers.{}.",
    input_norm="input_layernorm",
    attention=("attention.query_key_value",),
    dense="attention.dense",
    mlp_norm="post_attention_layernorm",
    linear1=("mlp.dense_h_to_4h",),
    linear2="mlp.dense_4h_to_h",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
)


GPT_NEOX = ModelFamily(
    name="neox",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=NAMES.table,
    spare=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    prefix="gpt_neox.",
)
