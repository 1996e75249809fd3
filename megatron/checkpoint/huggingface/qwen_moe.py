"""Qwen2-MoE and Qwen3-MoE: `Qwen2MoeForCausalLM`, `Qwen3MoeForCausalLM`.

Blocks of Qwen2 and Qwen3 with experts, in blocks that `decoder_sparse_step` and `mlp_only_layers` name. Qwen2-MoE has
shared experts with a gate. Windows are refused: releases of transformers give them to other blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.checkpoint.huggingface.expert_keys import expert_misfits
from megatron.checkpoint.huggingface.expert_tables import (
    dense_blocks,
    expert_rows,
    expert_width,
    placement,
    router_config,
    router_settings,
)
from megatron.checkpoint.huggingface.family import (
    QKV_BIAS,
    ExpertsMapping,
    ModelFamily,
    Settings,
    check_config,
)
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_misfits, decoder_settings
from megatron.checkpoint.huggingface.qwen import HEAD_NORMS
from megatron.checkpoint.huggingface.sliding_window import FULL, one_window
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.errors import ConfigIssue

SAID = frozenset({"moe_expert_interval", "moe_first_k_dense_replace", "moe_layer_freq", "moe_ffn_hidden_size"})
SHARED = "moe_shared_expert_intermediate_size"
_NONE = {"sliding_window_width": None, "use_bias_in_mlp": False}


def _qwen2_misfits(model: ModelSection) -> list[ConfigIssue]:
    others = {"use_qk_layernorm": False, "use_bias_in_attn_linear": False}
    return decoder_misfits(model, "Qwen2-MoE", **_NONE, **others)


def _qwen2_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    further = {"qkv_bias": bool(model.add_qkv_bias), "use_sliding_window": False}
    return decoder_config(model, padded_vocab_size) | further


def _qwen2_settings(theirs: Mapping[str, Any]) -> Settings:
    shared = {
        SHARED: theirs["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": True,
        QKV_BIAS: bool(theirs["qkv_bias"]),
    }
    return _settings({**theirs, "attention_bias": False}, "num_experts") | shared


def _settings(theirs: Mapping[str, Any], experts: str) -> Settings:
    check_config(theirs, {"use_sliding_window": False})
    one_window(theirs, None, [FULL] * theirs["num_hidden_layers"])
    return (
        decoder_settings({**theirs, "mlp_bias": False})
        | router_settings(theirs, experts)
        | placement(sparse_blocks(theirs))
        | {"moe_ffn_hidden_size": theirs["moe_intermediate_size"]}
    )


def sparse_blocks(theirs: Mapping[str, Any]) -> list[bool]:
    """Returns which blocks have experts."""
    step, plain = theirs["decoder_sparse_step"], set(theirs["mlp_only_layers"] or ())
    return [layer not in plain and step > 0 and (layer + 1) % step == 0 for layer in range(theirs["num_hidden_layers"])]


def sparse_config(model: ModelSection, moe: MoeSection) -> Settings:
    """Returns what config.json says of the router, and of the blocks that have experts."""
    return router_config(moe) | {
        "moe_intermediate_size": expert_width(model, moe),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_blocks(model, moe),
    }


def _qwen2_expert_misfits(model: ModelSection, moe: MoeSection) -> list[ConfigIssue]:
    errors = expert_misfits(moe, "Qwen2-MoE", SAID | {SHARED}, moe_shared_expert_gate=True)
    if moe.moe_shared_expert_intermediate_size is None:
        errors.append(ConfigIssue("a Qwen2-MoE model has shared experts", key=SHARED))
    return errors


def _qwen2_experts_config(model: ModelSection, moe: MoeSection) -> Settings:
    return sparse_config(model, moe) | {
        "num_experts": moe.moe_num_experts,
        "shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
    }


QWEN2_MOE = ModelFamily(
    name="qwen2_moe",
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    misfits=_qwen2_misfits,
    config=_qwen2_config,
    settings=_qwen2_settings,
    table=replace(NAMES, experts=expert_rows("shared_expert")).table,
    spare=(".rotary_emb.inv_freq",),
    parts=frozenset({QKV_BIAS}),
    prefix="model.",
    experts=ExpertsMapping(_qwen2_expert_misfits, _qwen2_experts_config),
)


def _qwen3_misfits(model: ModelSection) -> list[ConfigIssue]:
    return decoder_misfits(model, "Qwen3-MoE", **_NONE, use_qk_layernorm=True)


def _qwen3_config(model: ModelSection, padded_vocab_size: int) -> Settings:
    further = {"attention_bias": model.use_bias_in_attn_linear, "use_sliding_window": False}
    return decoder_config(model, padded_vocab_size) | further


def _qwen3_settings(theirs: Mapping[str, Any]) -> Settings:
    return _settings(theirs, "num_local_experts") | {"use_qk_layernorm": True}


def _qwen3_experts_config(model: ModelSection, moe: MoeSection) -> Settings:
    return sparse_config(model, moe) | {"num_experts": moe.moe_num_experts}


QWEN3_MOE = ModelFamily(
    name="qwen3_moe",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    misfits=_qwen3_misfits,
    config=_qwen3_config,
    settings=_qwen3_settings,
    table=replace(NAMES, head_norms=HEAD_NORMS, experts=expert_rows()).table,
    spare=(".rotary_emb.inv_freq",),
    prefix="model.",
    experts=ExpertsMapping(lambda model, moe: expert_misfits(moe, "Qwen3-MoE", SAID), _qwen3_experts_config),
)
