"""StarCoder2, Nemotron (`Starcoder2ForCausalLM`, `NemotronForCausalLM`): LLaMA's attention, layer norms, plain MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.checkpoint.huggingface.family import ModelFamily, Settings, check_config, choose, unlike
from megatron.checkpoint.huggingface.gpt_neox import ACTIVATIONS as OF_NEOX
from megatron.checkpoint.huggingface.gpt_neox import THEIR_ACTIVATIONS
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_misfits, decoder_settings
from megatron.checkpoint.huggingface.rope_config import CONFIG, rotary_settings
from megatron.checkpoint.huggingface.sliding_window import FULL, SLIDING, one_window
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigError, ConfigIssue

ACTIVATIONS = {**OF_NEOX, "squared_relu": "relu2"}
"""Ours -> theirs."""
ACTIVATIONS_BACK = {**THEIR_ACTIVATIONS, "relu2": "squared_relu"}


def _misfits(model: ModelSection, family: str, **others: object) -> list[ConfigIssue]:
    gated = {"activation": "swiglu"}  # which LLaMA's list asks for
    errors = decoder_misfits(model.model_copy(update=gated), family, use_bias_in_norms=True, **others)
    errors += unlike(model, {"use_qk_layernorm": False}, family)
    if model.activation not in ACTIVATIONS:
        errors.append(ConfigIssue("transformers has no such activation", key="activation", value=model.activation))
    return errors


def _starcoder2_misfits(model: ModelSection) -> list[ConfigIssue]:
    errors = _misfits(model, "StarCoder2", norm="layernorm")
    if model.use_bias_in_attn_linear != model.use_bias_in_mlp:
        what = "a StarCoder2 model has biases in attention and MLP, or in neither"
        errors.append(ConfigIssue(what, key="use_bias_in_mlp", value=model.use_bias_in_mlp))
    return errors


def _nemotron_misfits(model: ModelSection) -> list[ConfigIssue]:
    """Release 4.57.6 has no scaling of Nemotron's positions, 5.23 has."""
    others = {"norm": "layernorm_1p", "rotary_pct": model.rotary_pct, "sliding_window_width": None}
    return _misfits(model, "Nemotron", **others, rope_scaling=None)


def _config(model: ModelSection, padded_vocab_size: int, epsilon: str) -> Settings:
    settings = decoder_config(model.model_copy(update={"activation": "swiglu"}), padded_vocab_size)
    del settings["rms_norm_eps"]
    width = {"intermediate_size": model.mlp_width, "hidden_act": ACTIVATIONS[model.activation]}
    return settings | width | {epsilon: model.layernorm_epsilon}


def _starcoder2_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    further = {"use_bias": model.use_bias_in_mlp, "sliding_window": model.sliding_window_width}
    return _config(model, padded_vocab_size, "norm_epsilon") | further


def _nemotron_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    biases = {"attention_bias": model.use_bias_in_attn_linear, "mlp_bias": model.use_bias_in_mlp}
    part = {"partial_rotary_factor": model.rotary_pct}
    return _config(model, padded_vocab_size, "norm_eps") | biases | part


def _settings(theirs: Mapping[str, Any], epsilon: str, rotary: Settings | None = None) -> Settings:
    found = decoder_settings({**theirs, "hidden_act": "silu"}, rotary, epsilon=("layernorm_epsilon", epsilon))
    return found | {
        "activation": choose(ACTIVATIONS_BACK, theirs, "hidden_act"),
        "intermediate_size": theirs["intermediate_size"],
    }


def _starcoder2_settings(theirs: Mapping[str, Any]) -> Settings:
    check_config(theirs, {"residual_dropout": 0.0, "embedding_dropout": 0.0})
    window = theirs["sliding_window"]
    found = one_window(theirs, window, [FULL if window is None else SLIDING] * theirs["num_hidden_layers"])
    biases = {"attention_bias": theirs["use_bias"], "mlp_bias": theirs["use_bias"]}
    return _settings({**theirs, **biases}, "norm_epsilon") | {"norm": "layernorm"} | found


def _nemotron_settings(theirs: Mapping[str, Any]) -> Settings:
    rotary = rotary_settings(theirs, base="rope_theta")
    if "rope_scaling" in rotary:
        what = "some releases of transformers scale Nemotron's positions, and others leave it out without a word"
        raise ConfigError.of(what, key="rope_scaling", value=dict(rotary["rope_scaling"]), location=CONFIG)
    return _settings(theirs, "norm_eps", rotary) | {"norm": "layernorm_1p"}


_NAMES = replace(NAMES, norm_values=(("weight", "weight"), ("bias", "bias")))
STARCODER2 = ModelFamily(
    name="starcoder2",
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    misfits=_starcoder2_misfits,
    config=_starcoder2_config,
    settings=_starcoder2_settings,
    table=replace(_NAMES, linear1=("mlp.c_fc",), linear2="mlp.c_proj").table,
    spare=(".rotary_emb.inv_freq",),
    prefix="model.",
)
NEMOTRON = ModelFamily(
    name="nemotron",
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    misfits=_nemotron_misfits,
    config=_nemotron_config,
    settings=_nemotron_settings,
    table=replace(_NAMES, linear1=("mlp.up_proj",)).table,
    spare=(".rotary_emb.inv_freq",),
    prefix="model.",
)
