"""Mamba-2: `Mamba2ForCausalLM`. The tensors of a block have the same names and rows in both."""

from __future__ import annotations

import math
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
from megatron.checkpoint.huggingface.mamba import CONTEXT
from megatron.config.schema.mixers import MixersSection
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigError, ConfigIssue
from megatron.param_table import ModelDims
from megatron.param_table.mixer_dims import Mamba2Dims

SIZES: Settings = {"conv_kernel": 4, "hidden_act": "silu"}
"""What ours always has, by their names."""
LIMITS = "time_step_limit"
_PARTS = ("A_log", "D", "dt_bias", "conv1d.weight", "norm.weight")


def mamba2_rows(dims: ModelDims, ours: str, theirs: str) -> list[TensorMapping]:
    """Returns the rows of a mixer. ours, theirs: what the names in the block begin with."""
    names = [*_PARTS, *(("conv1d.bias",) if dims.mixers.mamba_conv_bias else ())]
    for linear in ("in_proj", "out_proj"):
        names += [f"{linear}.{kind}" for kind in (("weight", "bias") if dims.mixers.mamba_linear_bias else ("weight",))]
    return [same(f"{ours}mixer.{name}", f"{theirs}mixer.{name}") for name in names]


def number(value: Any) -> float | None:
    """Returns a bound as both releases write it: a number, Infinity, or an object for Infinity; None for no bound."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        value = value["__float__"]
    if value == "Infinity":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ConfigError.of("this is no bound of a step", key=LIMITS, value=value, location="config.json")
    return float(value) if math.isfinite(value) else None


def limit_settings(limits: Any) -> Settings:
    """Returns our key of two bounds. ConfigError where they are not two, or not in order."""
    if not isinstance(limits, (list, tuple)) or len(limits) != 2:
        what = "only a smallest and a largest step can be taken over"
        raise ConfigError.of(what, key=LIMITS, value=limits, location="config.json")
    low, high = number(limits[0]) or None, number(limits[1])
    if high is not None and (low or 0.0) > high:
        raise ConfigError.of("the smallest step is above the largest", key=LIMITS, value=limits, location="config.json")
    return {} if (low, high) == (None, None) else {"mamba_dt_limit": [low, high]}


def limit_config(mixers: MixersSection) -> list[float]:
    """Returns the two bounds for config.json."""
    low, high = mixers.mamba_dt_limit or (None, None)
    return [low or 0.0, math.inf if high is None else high]


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    errors = unlike(model, {"norm": "rmsnorm", "pos_emb": "none"}, "Mamba-2")
    others = sorted(set(map(str, model.attention_config or ())) - {"mamba2"})
    if others:
        what = f"every block of a Mamba-2 model is of kind mamba2, not {', '.join(others)}"
        errors.append(ConfigIssue(what, key="attention_config", value=others))
    return errors


def _mixer_misfits(model: ModelSection, mixers: MixersSection) -> list[ConfigIssue]:
    errors = unlike(mixers, {"mamba_norm_before_gate": False}, "Mamba-2")
    inner = Mamba2Dims.of(model, mixers).inner
    assert model.hidden_size
    if inner % model.hidden_size:
        what = f"the {inner} features of all heads of a Mamba-2 model are a multiple of hidden_size"
        errors.append(ConfigIssue(what, key="mamba_num_heads", value=mixers.mamba_num_heads))
    return errors


def _mixer_config(model: ModelSection, mixers: MixersSection) -> Settings:
    sizes = Mamba2Dims.of(model, mixers)
    assert model.hidden_size
    limits = {} if mixers.mamba_dt_limit is None else {LIMITS: limit_config(mixers)}
    return limits | {
        "num_heads": sizes.heads,
        "head_dim": sizes.head,
        "state_size": sizes.state,
        "n_groups": sizes.groups,
        "expand": sizes.inner // model.hidden_size,
        "use_bias": mixers.mamba_use_bias_in_linears,
        "use_conv_bias": mixers.mamba_use_bias_in_conv,
    }


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return SIZES | {
        "vocab_size": padded_vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "layer_norm_epsilon": model.rms_norm_epsilon,
        "tie_word_embeddings": not model.no_weight_tying,
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    check_config(theirs, SIZES | {"rms_norm": True})
    features = theirs["num_heads"] * theirs["head_dim"]
    if features != theirs["expand"] * theirs["hidden_size"]:
        what = f"the heads have {features} features, and expand x hidden_size is another number"
        raise ConfigError.of(what, key="expand", value=theirs["expand"], location="config.json")
    return limit_settings(theirs[LIMITS] or [0.0, math.inf]) | {
        "num_layers": theirs["num_hidden_layers"],
        "hidden_size": theirs["hidden_size"],
        "num_attention_heads": 1,  # a Mamba-2 block has no attention; the key is required
        "attention_config": [[["mamba2"], "all"]],
        "pos_emb": "none",
        "norm": "rmsnorm",
        "rms_norm_epsilon": float(theirs["layer_norm_epsilon"]),
        "mamba_num_heads": theirs["num_heads"],
        "mamba_head_dim": theirs["head_dim"],
        "mamba_state_dim": theirs["state_size"],
        "mamba_num_groups": theirs["n_groups"],
        "mamba_use_bias_in_linears": bool(theirs["use_bias"]),
        "mamba_use_bias_in_conv": bool(theirs["use_conv_bias"]),
        "max_position_embeddings": CONTEXT,
        "no_weight_tying": not theirs["tie_word_embeddings"],
    }


def _table(dims: ModelDims) -> list[TensorMapping]:
    rows = [same("0.word_embeddings.weight", "backbone.embeddings.weight")]
    for block in range(dims.num_layers):
        ours, theirs = f"{block + 2}.", f"backbone.layers.{block}."
        rows.append(same(f"{ours}norm.scale", f"{theirs}norm.weight"))
        rows += mamba2_rows(dims, ours, theirs)
    last = dims.num_layers + 3
    rows.append(same(f"{last}.norm.scale", "backbone.norm_f.weight"))
    if not dims.tied:
        rows.append(same(f"{last + 1}.final_linear.weight", "lm_head.weight"))
    return rows


MAMBA2 = ModelFamily(
    name="mamba2",
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=_table,
    prefix="backbone.",
    mixers=Mixers(frozenset({"mamba2"}), _mixer_misfits, _mixer_config),
)
