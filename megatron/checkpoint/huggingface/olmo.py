"""OLMo 2 and OLMo 3: `Olmo2ForCausalLM`, `Olmo3ForCausalLM`.

Norms on what attention and MLP give, and one norm over all heads of queries and of keys. OLMo 3 has windows in three
blocks of four, and a scaling of positions in the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.checkpoint.huggingface.family import PARTS, ModelFamily, Settings
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_misfits, decoder_settings
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

USUAL_WINDOW = 4096
_OTHERS = {
    "norm_placement": "output",
    "use_qk_layernorm": True,
    "qk_layernorm_across_heads": True,
    "use_bias_in_mlp": False,
}


def _olmo2_misfits(model: ModelSection) -> list[ConfigIssue]:
    return decoder_misfits(model, "OLMo 2", **_OTHERS, sliding_window_width=None)


def _olmo3_misfits(model: ModelSection) -> list[ConfigIssue]:
    errors = decoder_misfits(model, "OLMo 3", **_OTHERS) + window_misfits(model, "OLMo 3", one_rope=False)
    return errors + typed_rope_misfits(model, "OLMo 3", own_base=False)


def _olmo2_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return decoder_config(model, padded_vocab_size) | {"attention_bias": model.use_bias_in_attn_linear}


def _olmo3_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    windows = {"sliding_window": window_of(model) or USUAL_WINDOW, "layer_types": kinds_of(model)}
    return _olmo2_config(model, padded_vocab_size) | windows | typed_rope_config(model, None)


def _olmo2_settings(theirs: Mapping[str, Any]) -> Settings:
    return decoder_settings({**theirs, "mlp_bias": False}) | _OTHERS


def _olmo3_settings(theirs: Mapping[str, Any]) -> Settings:
    kinds = listed_kinds(theirs, periodic_kinds(theirs["num_hidden_layers"], 4))
    rope = typed_rope(theirs, None)
    found = decoder_settings({**theirs, "mlp_bias": False}, {"rotary_pct": 1.0, **rope[FULL]}) | _OTHERS
    local = {"sliding_window_width": theirs["sliding_window"], "rope_scaling": None, **rope[SLIDING]}
    return found | typed_blocks(kinds, {SLIDING: local, FULL: {}})


_NAMES = replace(
    NAMES,
    input_norm=None,
    mlp_norm=None,
    attention_output_norm="post_attention_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
    head_norms=HEAD_NORMS,
)
_PARTS = frozenset(PARTS.keys() & _OTHERS.keys())
OLMO2 = ModelFamily(
    name="olmo2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    misfits=_olmo2_misfits,
    config=_olmo2_config,
    settings=_olmo2_settings,
    table=_NAMES.table,
    spare=(".rotary_emb.inv_freq",),
    parts=_PARTS,
    class_pads=True,
    prefix="model.",
)
OLMO3 = ModelFamily(
    name="olmo3",
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    misfits=_olmo3_misfits,
    config=_olmo3_config,
    settings=_olmo3_settings,
    table=_NAMES.table,
    spare=(".rotary_emb.inv_freq",),
    parts=_PARTS | {"layer_types"},
    class_pads=True,
    prefix="model.",
)
