"""MPT: `MptForCausalLM` of transformers, the models with ALiBi; no biases, an MLP of four times the width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.family import ModelFamily, Settings, check_config, special_attention, unlike
from megatron.checkpoint.huggingface.name_map import Names
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigError, ConfigIssue
from megatron.param_table import ModelDims


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    expected = {"norm": "layernorm", "pos_emb": "alibi", "gpt_j_residual": False, "activation": "gelu"}
    expected |= {"use_bias_in_norms": False, "use_bias_in_attn_linear": False, "use_bias_in_mlp": False}
    expected |= {"num_kv_heads": model.num_attention_heads, "sliding_window_width": None, "use_qk_layernorm": False}
    errors = unlike(model, expected, "MPT") + special_attention(model, "MPT")
    dims = ModelDims.of(model)
    if dims.mlp_width != 4 * dims.hidden_size:
        errors.append(ConfigIssue("an MPT model has an MLP of 4 x hidden_size", "intermediate_size", dims.mlp_width))
    if dims.head_dim * dims.num_attention_heads != dims.hidden_size:
        errors.append(ConfigIssue("an MPT model has hidden_size / heads", key="kv_channels", value=model.kv_channels))
    if dims.num_attention_heads & (dims.num_attention_heads - 1):
        what = "an MPT model gives other slopes to a number of heads that is no power of two"
        errors.append(ConfigIssue(what, key="num_attention_heads", value=dims.num_attention_heads))
    return errors


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return {
        "vocab_size": padded_vocab_size,
        "d_model": model.hidden_size,
        "n_layers": model.num_layers,
        "n_heads": model.num_attention_heads,
        "max_seq_len": model.max_position_embeddings,
        "layer_norm_epsilon": model.layernorm_epsilon,
        "attn_config": {"alibi": True},  # its attn_pdrop is a whole number there, and so is left at 0
        "no_bias": True,
        "emb_pdrop": model.hidden_dropout,
        "tie_word_embeddings": not model.no_weight_tying,
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    attention = theirs.get("attn_config") or {}
    check_config(attention, {"alibi": True, "alibi_bias_max": 8, "qk_ln": False, "prefix_lm": False})
    check_config(attention, {"clip_qkv": None, "softmax_scale": None, "attn_type": "multihead_attention"})
    check_config(theirs, {"no_bias": True, "logit_scale": None, "expansion_ratio": 4})
    if theirs["n_heads"] & (theirs["n_heads"] - 1):
        what = "only a power of two can be taken over: other numbers of heads have other slopes here"
        raise ConfigError.of(what, key="n_heads", value=theirs["n_heads"], location="config.json")
    return {
        "num_layers": theirs["n_layers"],
        "hidden_size": theirs["d_model"],
        "num_attention_heads": theirs["n_heads"],
        "intermediate_size": 4 * theirs["d_model"],
        "activation": "gelu",
        "max_position_embeddings": theirs["max_seq_len"],
        "norm": "layernorm",
        "layernorm_epsilon": float(theirs["layer_norm_epsilon"]),
        "pos_emb": "alibi",
        "use_bias_in_norms": False,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
        "no_weight_tying": not theirs["tie_word_embeddings"],
    }


NAMES = Names(
    embedding="transformer.wte",
    block="transformer.blocks.{}.",
    input_norm="norm_1",
    attention=("attn.Wqkv",),
    by_head=False,
    dense="attn.out_proj",
    mlp_norm="norm_2",
    linear1=("ffn.up_proj",),
    linear2="ffn.down_proj",
    final_norm="transformer.norm_f",
    head="lm_head",
    norm_values=(("weight", "weight"),),
)
MPT = ModelFamily(
    name="mpt",
    model_type="mpt",
    architecture="MPTForCausalLM",  # as the authors call it; transformers goes by the model type
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=NAMES.table,
    prefix="transformer.",
)
