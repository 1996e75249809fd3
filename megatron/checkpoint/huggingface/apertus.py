"""Apertus (`ApertusForCausalLM`): LLaMA's attention with a norm of each head, and a plain MLP with xIELU.

Their files hold the two constants of xIELU beside its learned factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.huggingface.config_defaults import DEFAULTS
from megatron.checkpoint.huggingface.family import ModelFamily, Settings, TensorMapping, check_config, same, unlike
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_misfits, decoder_settings
from megatron.checkpoint.huggingface.qwen import HEAD_NORMS
from megatron.checkpoint.huggingface.rope_config import CONFIG, usual_rotary
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigError, ConfigIssue
from megatron.param_table import ModelDims

XIELU = "xielu"
CONSTANTS = {"beta": 0.5, "eps": -1e-6}
USUAL_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_NAMES = replace(
    NAMES,
    input_norm="attention_layernorm",
    mlp_norm="feedforward_layernorm",
    linear1=("mlp.up_proj",),
    linear2="mlp.down_proj",
    head_norms=HEAD_NORMS,
)


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    gated = model.model_copy(update={"activation": "swiglu"})  # which LLaMA's list asks for
    others = {"use_qk_layernorm": True, "use_bias_in_mlp": False, "sliding_window_width": None}
    return decoder_misfits(gated, "Apertus", **others) + unlike(model, {"activation": XIELU}, "Apertus")


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    found = decoder_config(model.model_copy(update={"activation": "swiglu"}), padded_vocab_size)
    plain = {} if model.rope_scaling else {"rope_scaling": {"rope_type": "default"}}
    further = {"hidden_act": XIELU, "intermediate_size": model.mlp_width, **plain}
    return found | further | {"attention_bias": model.use_bias_in_attn_linear}


def _settings(theirs: Mapping[str, Any]) -> Settings:
    check_config(theirs, {"hidden_act": XIELU})
    rotary = usual_rotary(theirs, USUAL_SCALING)
    _check_base(theirs)
    found = decoder_settings({**theirs, "hidden_act": "silu", "mlp_bias": False}, rotary)
    width = {"intermediate_size": theirs["intermediate_size"]}
    return found | {"activation": XIELU, "use_qk_layernorm": True} | width


def _check_base(theirs: Mapping[str, Any]) -> None:
    """ConfigError for a base beside no scaling, which release 5 reads only together with one."""
    named = any(theirs.get(key) for key in ("rope_parameters", "rope_scaling"))
    base, usual = theirs.get("rope_theta"), DEFAULTS["apertus"]["rope_theta"]
    if not named and base not in (None, usual):
        what = f"without a scaling beside it, releases of transformers take this base, or {usual:,}"
        hint = "write rope_scaling: {rope_type: default}, or the scaling"
        raise ConfigError.of(what, key="rope_theta", value=base, location=CONFIG, hint=hint)


def _table(dims: ModelDims) -> list[TensorMapping]:
    rows = _NAMES.table(dims)
    for block in range(dims.num_layers):
        ours, theirs = f"{block + 2}.mlp.activation.", f"{_NAMES.block.format(block)}mlp.act_fn."
        rows.append(_with_constants(f"{ours}alpha_p", theirs))
        rows.append(same(f"{ours}alpha_n", f"{theirs}alpha_n"))
    return rows


def _with_constants(ours: str, theirs: str) -> TensorMapping:
    """The factor above zero, and the constants. theirs: what their names begin with."""

    def apart(tensor: Tensor) -> Sequence[Tensor]:
        made = [torch.full((), value, dtype=tensor.dtype, device=tensor.device) for value in CONSTANTS.values()]
        return (tensor, *made)

    def together(tensors: Sequence[Tensor]) -> Tensor:
        factor, *found = tensors
        for (name, value), tensor in zip(CONSTANTS.items(), found, strict=True):
            if tensor.item() != torch.tensor(value, dtype=tensor.dtype).item():
                what = f"tensor {theirs}{name} is {tensor.item():g}, and xIELU has {value:g} here"
                raise ConfigError.of(what, location="weights")
        return factor

    names = (f"{theirs}alpha_p", *(f"{theirs}{name}" for name in CONSTANTS))
    return TensorMapping(ours, names, apart, together)


APERTUS = ModelFamily(
    name="apertus",
    model_type="apertus",
    architecture="ApertusForCausalLM",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=_table,
    spare=(".rotary_emb.inv_freq",),
    prefix="model.",
)
