"""T5 of transformers: `T5ForConditionalGeneration`, version 1.0 with a tied output layer and 1.1 with one of its own.

Version 1.0 multiplies the output layer's input by d_model ** -0.5. Releases name the version by `tie_word_embeddings`;
transformers 5 writes true for both, and `scale_decoder_outputs` for the version. A model of version 1.1 that was made
there is tied, without the factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.huggingface.family import (
    ModelFamily,
    Settings,
    TensorMapping,
    check_config,
    choose,
    fused,
    same,
    special_attention,
    stacked,
    unlike,
)
from megatron.config.derived.encoder_decoder import SPANS
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigIssue
from megatron.param_table import ModelDims
from megatron.registry import ACTIVATIONS

_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "silu": "silu",
    "gated-gelu": "geglu_tanh",
    "gated-silu": "swiglu",
    "gated-relu": "reglu",
}
"""Their feed_forward_proj, whose gated-gelu is the tanh formula -> our activation."""
_BACK = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
LENGTH = 512
"""Tokens of the encoder and of the decoder where config.json says none, as released models were trained with."""


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    tied = not model.no_weight_tying
    expected: dict[str, object] = {"norm": "rmsnorm", "pos_emb": "relative", "softmax_scale": 1.0}
    expected |= {"num_kv_heads": model.num_attention_heads, "use_bias_in_attn_linear": False, "use_bias_in_mlp": False}
    expected["logit_scale"] = (model.hidden_size or 1) ** -0.5 if tied else 1.0
    errors = []
    if tied and model.logit_scale == 1.0:
        expected.pop("logit_scale")
        what = "releases before 5 would give this model an output layer of random values, or this factor"
        hint = "write the output layer as a matrix of its own: convert_to_hf.py --own-head"
        errors.append(ConfigIssue(what, key="logit_scale", value=1.0, hint=hint))
    errors += unlike(model, expected, "T5") + special_attention(model, "T5")
    if model.activation not in _BACK:
        what = f"a T5 model has one of {', '.join(sorted(_BACK))}"
        errors.append(ConfigIssue(what, key="activation", value=model.activation))
    if model.hidden_dropout != model.attention_dropout:
        what = f"a T5 model has one dropout, that of hidden_dropout, {model.hidden_dropout}"
        errors.append(ConfigIssue(what, key="attention_dropout", value=model.attention_dropout))
    return errors


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return {
        "vocab_size": padded_vocab_size,
        "d_model": model.hidden_size,
        "d_kv": ModelDims.of(model).head_dim,
        "d_ff": model.mlp_width,
        "num_layers": model.encoder_num_layers,
        "num_decoder_layers": model.decoder_num_layers,
        "num_heads": model.num_attention_heads,
        "relative_attention_num_buckets": model.rpe_num_buckets,
        "relative_attention_max_distance": model.rpe_max_distance,
        "feed_forward_proj": _BACK[model.activation],
        "dropout_rate": model.hidden_dropout,
        "layer_norm_epsilon": model.rms_norm_epsilon,
        "tie_word_embeddings": not model.no_weight_tying,
        "n_positions": model.encoder_seq_length,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    check_config(theirs, {"is_encoder_decoder": True, "is_decoder": False})
    tied, scaled = bool(theirs["tie_word_embeddings"]), theirs.get("scale_decoder_outputs")
    if scaled is None:
        scaled = tied
    else:  # transformers 5 ties every model, and takes an output layer of its own where the files hold one
        tied = bool(scaled) or not theirs["stores_head"]
    activation = choose(_ACTIVATIONS, theirs, "feed_forward_proj")
    length = theirs.get("n_positions") or LENGTH
    return {
        "train_impl": SPANS,
        "pack_impl": "unpacked",
        "encoder_num_layers": theirs["num_layers"],
        "decoder_num_layers": theirs["num_decoder_layers"] or theirs["num_layers"],
        "encoder_seq_length": length,
        "decoder_seq_length": length,
        "max_position_embeddings": length,
        "hidden_size": theirs["d_model"],
        "num_attention_heads": theirs["num_heads"],
        "kv_channels": theirs["d_kv"],
        "intermediate_size": theirs["d_ff"] * (3 if ACTIVATIONS.entry(activation).gated else 1),
        "activation": activation,
        "norm": "rmsnorm",
        "rms_norm_epsilon": float(theirs["layer_norm_epsilon"]),
        "pos_emb": "relative",
        "rpe_num_buckets": theirs["relative_attention_num_buckets"],
        "rpe_max_distance": theirs["relative_attention_max_distance"],
        "softmax_scale": 1.0,
        "logit_scale": theirs["d_model"] ** -0.5 if scaled else 1.0,
        "no_weight_tying": not tied,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
        "hidden_dropout": float(theirs["dropout_rate"]),
        "attention_dropout": float(theirs["dropout_rate"]),
    }


def _table(dims: ModelDims) -> list[TensorMapping]:
    last = dims.num_layers + 3
    tables = tuple(
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for stack in ("encoder", "decoder")
    )
    rows = [
        same("0.word_embeddings.weight", "shared.weight"),
        stacked("2.attention.rpe.weight", tables),
        same(f"{dims.encoder_layers + 1}.encoder_layernorm.scale", "encoder.final_layer_norm.weight"),
        same(f"{last}.norm.scale", "decoder.final_layer_norm.weight"),
    ]
    for block in range(dims.num_layers):
        rows += _block(dims, block)
    return rows if dims.tied else [*rows, same(f"{last + 1}.final_linear.weight", "lm_head.weight")]


def _block(dims: ModelDims, block: int) -> list[TensorMapping]:
    encodes = dims.encodes(block)
    theirs = f"encoder.block.{block}.layer." if encodes else f"decoder.block.{block - dims.encoder_layers}.layer."
    ours, mlp = f"{block + 2}.", 1 if encodes else 2
    attention, dense = f"{theirs}0.SelfAttention.", f"{theirs}{mlp}.DenseReluDense."
    q, k, v = (f"{attention}{name}.weight" for name in "qkv")
    first = ("wi_1", "wi_0") if dims.gated else ("wi",)
    rows = [
        same(f"{ours}input_layernorm.scale", f"{theirs}0.layer_norm.weight"),
        fused(f"{ours}attention.query_key_value.weight", (q, k, v), dims),
        same(f"{ours}attention.dense.weight", f"{attention}o.weight"),
        same(f"{ours}post_attention_layernorm.scale", f"{theirs}{mlp}.layer_norm.weight"),
        stacked(f"{ours}mlp.linear1.weight", tuple(f"{dense}{name}.weight" for name in first)),
        same(f"{ours}mlp.linear2.weight", f"{dense}wo.weight"),
    ]
    if encodes:
        return rows
    cross = f"{theirs}1.EncDecAttention."
    return [
        *rows,
        same(f"{ours}cross_attention_layernorm.scale", f"{theirs}1.layer_norm.weight"),
        same(f"{ours}cross_attention.query.weight", f"{cross}q.weight"),
        _keys_values(f"{ours}cross_attention.key_value.weight", (f"{cross}k.weight", f"{cross}v.weight"), dims),
        same(f"{ours}cross_attention.dense.weight", f"{cross}o.weight"),
    ]


def _keys_values(ours: str, theirs: tuple[str, str], dims: ModelDims) -> TensorMapping:
    """Keys and values of cross attention: head by head here, apart in transformers."""
    heads = dims.num_kv_heads

    def apart(rows: Tensor) -> Sequence[Tensor]:
        by_head = rows.unflatten(0, (heads, 2, dims.head_dim))  # [m, 2, d, h]
        return by_head[:, 0].flatten(0, 1), by_head[:, 1].flatten(0, 1)

    def together(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([part.unflatten(0, (heads, dims.head_dim)) for part in parts], 1).flatten(0, 2)

    return TensorMapping(ours, theirs, apart, together)


T5 = ModelFamily(
    name="t5",
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=_table,
    spare=("EncDecAttention.relative_attention_bias.weight",),
    copies=dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight"),
    parts=frozenset({"softmax_scale", "logit_scale"}),
    encoder_decoder=True,
)
