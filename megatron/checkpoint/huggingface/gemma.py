"""Gemma 2 and the text model of Gemma 3: `Gemma2ForCausalLM`, `Gemma3ForCausalLM`.

Norms on both sides with the factor 1 + weight, embeddings times the root of the width, a factor of scores of their own,
windows in some blocks. Gemma 2 bounds scores and logits; Gemma 3 has a norm of each head, and bases and a scaling of
positions by the kind of block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.checkpoint.huggingface.family import PARTS, ModelFamily, Settings, check_config, choose
from megatron.checkpoint.huggingface.llama import (
    ACTIVATIONS_BACK,
    NAMES,
    decoder_config,
    decoder_misfits,
    decoder_settings,
)
from megatron.checkpoint.huggingface.qwen import HEAD_NORMS
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
from megatron.checkpoint.huggingface.typed_rope import typed_rope, typed_rope_config, typed_rope_misfits
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigIssue
from megatron.param_table import ModelDims

LOCAL_BASE = "rope_local_base_freq"
USUAL_WINDOW = 4096
_OTHERS = {
    "norm": "rmsnorm_1p",
    "norm_placement": "sandwich",
    "scale_embeddings": True,
    "use_bias_in_mlp": False,
}


def _scalar(model: ModelSection) -> int:
    """Returns the whole number whose root divides the scores."""
    return ModelDims.of(model).head_dim if model.softmax_scale is None else round(model.softmax_scale**-2)


def _misfits(model: ModelSection, family: str, *, head_norms: bool) -> list[ConfigIssue]:
    errors = decoder_misfits(model, family, **_OTHERS, use_qk_layernorm=head_norms)
    if model.softmax_scale is not None and abs(_scalar(model) ** -0.5 / model.softmax_scale - 1) > 1e-12:
        what = f"a {family} model divides scores by the root of a whole number"
        errors.append(ConfigIssue(what, key="softmax_scale", value=model.softmax_scale))
    return errors


def _gemma2_misfits(model: ModelSection) -> list[ConfigIssue]:
    return _misfits(model, "Gemma 2", head_norms=False) + window_misfits(model, "Gemma 2")


def _gemma3_misfits(model: ModelSection) -> list[ConfigIssue]:
    """Transformers reads attn_logit_softcapping of Gemma 3 and does not apply it."""
    errors = _misfits(model, "Gemma 3", head_norms=True) + window_misfits(model, "Gemma 3", one_rope=False)
    return errors + typed_rope_misfits(model, "Gemma 3", own_base=True)


def _gemma2_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    settings = decoder_config(model, padded_vocab_size)
    settings["hidden_activation"] = settings["hidden_act"]
    return settings | {
        "attention_bias": model.use_bias_in_attn_linear,
        "query_pre_attn_scalar": _scalar(model),
        "sliding_window": window_of(model) or USUAL_WINDOW,
        "layer_types": kinds_of(model),
        "final_logit_softcapping": model.final_logit_softcapping,
        "attn_logit_softcapping": model.attn_logit_softcapping,
    }


def _gemma3_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return _gemma2_config(model, padded_vocab_size) | typed_rope_config(model, LOCAL_BASE)


def _settings(theirs: Mapping[str, Any], rotary: Settings | None) -> Settings:
    check_config(theirs, {"use_bidirectional_attention": False})
    activation = choose(ACTIVATIONS_BACK, theirs, "hidden_activation")
    found = decoder_settings({**theirs, "hidden_act": "silu", "mlp_bias": False}, rotary)
    return found | {
        **_OTHERS,
        "activation": activation,
        "softmax_scale": theirs["query_pre_attn_scalar"] ** -0.5,
        "final_logit_softcapping": theirs["final_logit_softcapping"],
    }


def _gemma2_settings(theirs: Mapping[str, Any]) -> Settings:
    kinds = listed_kinds(theirs, periodic_kinds(theirs["num_hidden_layers"], 2))
    found = _settings(theirs, None) | {"attn_logit_softcapping": theirs["attn_logit_softcapping"]}
    return found | typed_blocks(kinds, {SLIDING: {"sliding_window_width": theirs["sliding_window"]}, FULL: {}})


def _gemma3_settings(theirs: Mapping[str, Any]) -> Settings:
    check_config(theirs, {"attn_logit_softcapping": None})
    kinds = listed_kinds(theirs, periodic_kinds(theirs["num_hidden_layers"], theirs["sliding_window_pattern"] or 6))
    rope = typed_rope(theirs, LOCAL_BASE)
    found = _settings(theirs, {"rotary_pct": 1.0, **rope[FULL]}) | {"use_qk_layernorm": True}
    local = {"sliding_window_width": theirs["sliding_window"], "rope_scaling": None, **rope[SLIDING]}
    return found | typed_blocks(kinds, {SLIDING: local, FULL: {}})


_NAMES = replace(
    NAMES,
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
_PARTS = frozenset({*(PARTS.keys() & _OTHERS.keys()), "softmax_scale", "final_logit_softcapping", "layer_types"})
GEMMA2 = ModelFamily(
    name="gemma2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    misfits=_gemma2_misfits,
    config=_gemma2_config,
    settings=_gemma2_settings,
    table=_NAMES.table,
    spare=(".rotary_emb.inv_freq",),
    parts=_PARTS | {"attn_logit_softcapping"},
    class_pads=True,
    prefix="model.",
)
GEMMA3 = ModelFamily(
    name="gemma3",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    misfits=_gemma3_misfits,
    config=_gemma3_config,
    settings=_gemma3_settings,
    table=replace(_NAMES, head_norms=HEAD_NORMS).table,
    spare=(".rotary_emb.inv_freq",),
    parts=_PARTS,
    class_pads=True,
    prefix="model.",
)
