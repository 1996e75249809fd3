"""SmolLM3: `SmolLM3ForCausalLM`. LLaMA's blocks, of which every fourth has no rotary positions.

Blocks without positions may have a window (`use_sliding_window`), or those that `layer_types` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.family import ModelFamily, Settings
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_misfits, decoder_settings
from megatron.checkpoint.huggingface.sliding_window import (
    SLIDING,
    kinds_of,
    listed_kinds,
    typed_blocks,
    window_misfits,
    window_of,
)
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigError, ConfigIssue

NOPE = "no_positions"


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    errors = decoder_misfits(model, "SmolLM3", use_qk_layernorm=False)
    errors += window_misfits(model, "SmolLM3", one_rope=False)
    own = (model.rotary_emb_base, model.rope_scaling)
    if any((block.rotary_emb_base, block.rope_scaling) != own for block in model.block_options if block.rotary):
        what = "blocks of a SmolLM3 model have the same rotary positions, or none"
        errors.append(ConfigIssue(what, key="layer_type_options", value=model.layer_type_options))
    return errors


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    window = window_of(model)
    return decoder_config(model, padded_vocab_size) | {
        "attention_bias": model.use_bias_in_attn_linear,
        "mlp_bias": model.use_bias_in_mlp,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "no_rope_layers": [int(block.rotary) for block in model.block_options],
        "layer_types": kinds_of(model),
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    layers, interval = theirs["num_hidden_layers"], theirs["no_rope_layer_interval"]
    listed = theirs.get("no_rope_layers")
    rotary = [bool((layer + 1) % interval) for layer in range(layers)] if listed is None else list(map(bool, listed))
    if len(rotary) < layers:
        what = f"it says less than {layers} layers have"
        raise ConfigError.of(what, key="no_rope_layers", value=listed, location="config.json")
    windows = theirs["use_sliding_window"] and theirs["sliding_window"] is not None
    usual = [SLIDING if windows and not rotary[layer] else "full_attention" for layer in range(layers)]
    kinds = listed_kinds(theirs, usual)
    if SLIDING in kinds and not theirs["use_sliding_window"]:
        what = "layer_types has blocks with a window"
        raise ConfigError.of(what, key="use_sliding_window", value=False, location="config.json")
    options: dict[str, Settings] = {}
    names = []
    for kind, positions in zip(kinds, rotary, strict=False):
        name = kind if positions else f"{kind}, {NOPE}"
        window = {"sliding_window_width": theirs["sliding_window"]} if kind == SLIDING else {}
        options[name] = window if positions else {**window, "rotary": False}
        names.append(name)
    return decoder_settings(theirs) | typed_blocks(names, options)


SMOLLM3 = ModelFamily(
    name="smollm3",
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=NAMES.table,
    spare=(".rotary_emb.inv_freq",),
    parts=frozenset({"layer_types"}),
    class_pads=True,
    prefix="model.",
)
