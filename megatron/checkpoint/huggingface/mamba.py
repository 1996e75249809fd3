"""Mamba: `MambaForCausalLM`. The tensors of a block have the same names and rows in both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.family import (
    Mixers,
    ModelFamily,
    Settings,
    TensorMapping,
    check_config,
    same,
    unlike,
)
from megatron.config.schema.mixers import MixersSection
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigIssue
from megatron.param_table import ModelDims

SIZES: Settings = {"state_size": 16, "conv_kernel": 4, "expand": 2, "hidden_act": "silu", "use_bias": False}
"""What ours always has, by their names."""

CONTEXT = 2048
"""Their configuration names no longest sequence, and ours must; Mamba itself has none [tokens]."""

_PARTS = ("A_log", "D", "in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias")


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    errors = unlike(model, {"norm": "rmsnorm", "pos_emb": "none"}, "Mamba")
    others = sorted(set(map(str, model.attention_config or ())) - {"mamba"})
    if others:
        what = f"every block of a Mamba model is of kind mamba, not {', '.join(others)}"
        errors.append(ConfigIssue(what, key="attention_config", value=others))
    return errors


def _mixer_misfits(model: ModelSection, mixers: MixersSection) -> list[ConfigIssue]:
    return unlike(mixers, {"mamba_use_bias_in_linears": False}, "Mamba")


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    assert model.hidden_size
    return SIZES | {
        "vocab_size": padded_vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "intermediate_size": SIZES["expand"] * model.hidden_size,
        "time_step_rank": -(-model.hidden_size // 16),
        "layer_norm_epsilon": model.rms_norm_epsilon,
        "tie_word_embeddings": not model.no_weight_tying,
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    hidden = theirs["hidden_size"]
    check_config(theirs, SIZES)
    if theirs["time_step_rank"] != "auto":
        check_config(theirs, {"time_step_rank": -(-hidden // 16)})
    check_config(theirs, {"intermediate_size": SIZES["expand"] * hidden})
    return {
        "num_layers": theirs["num_hidden_layers"],
        "hidden_size": hidden,
        "num_attention_heads": 1,  # a Mamba block has no heads; the key is required
        "attention_config": [[["mamba"], "all"]],
        "pos_emb": "none",
        "norm": "rmsnorm",
        "rms_norm_epsilon": float(theirs["layer_norm_epsilon"]),
        "mamba_use_bias_in_conv": bool(theirs["use_conv_bias"]),
        "max_position_embeddings": CONTEXT,
        "no_weight_tying": not theirs["tie_word_embeddings"],
    }


def _table(dims: ModelDims) -> list[TensorMapping]:
    rows = [same("0.word_embeddings.weight", "backbone.embeddings.weight")]
    for block in range(dims.num_layers):
        ours, theirs = f"{block + 2}.", f"backbone.layers.{block}."
        rows.append(same(f"{ours}norm.scale", f"{theirs}norm.weight"))
        bias = ("conv1d.bias",) if dims.mixers.mamba_conv_bias else ()
        rows += [same(f"{ours}mixer.{name}", f"{theirs}mixer.{name}") for name in (*_PARTS, *bias, "out_proj.weight")]
    last = dims.num_layers + 3
    rows.append(same(f"{last}.norm.scale", "backbone.norm_f.weight"))
    if not dims.tied:
        rows.append(same(f"{last + 1}.final_linear.weight", "lm_head.weight"))
    return rows


MAMBA = ModelFamily(
    name="mamba",
    model_type="mamba",
    architecture="MambaForCausalLM",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=_table,
    prefix="backbone.",
    mixers=Mixers(
        frozenset({"mamba"}), _mixer_misfits, lambda _, mixers: {"use_conv_bias": mixers.mamba_use_bias_in_conv}
    ),
)
