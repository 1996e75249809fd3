"""GLM-4-MoE: `Glm4MoeForCausalLM`, of GLM-4.5 and 4.6.

LLaMA's attention with rotary positions in a part of each head; DeepSeek-V3's experts: sigmoid scores, groups, a scaling
factor, a correction bias and shared experts, behind some dense blocks. The blocks behind the last one, which predict
further tokens, are left out, as transformers leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.checkpoint.huggingface.expert_keys import expert_misfits
from megatron.checkpoint.huggingface.expert_tables import expert_rows, expert_width, several
from megatron.checkpoint.huggingface.family import QKV_BIAS, ExpertsMapping, ModelFamily, Settings
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_misfits, decoder_settings
from megatron.checkpoint.huggingface.qwen import HEAD_NORMS
from megatron.checkpoint.huggingface.rope_config import rotary_settings
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.errors import ConfigError, ConfigIssue

GROUP_EXPERTS = 2
"""Experts whose scores make the score of a group."""
_SHARED = "moe_shared_expert_intermediate_size"
_SAID = frozenset(
    {
        *("moe_first_k_dense_replace", "moe_ffn_hidden_size", _SHARED),
        *("moe_router_num_groups", "moe_router_topk_scaling_factor"),
    }
)


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    others = {"sliding_window_width": None, "use_bias_in_mlp": False, "use_bias_in_attn_linear": False}
    return decoder_misfits(model, "GLM-4-MoE", **others, rotary_pct=model.rotary_pct)


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return decoder_config(model, padded_vocab_size) | {
        "attention_bias": bool(model.add_qkv_bias),
        "use_qk_norm": model.use_qk_layernorm,
        "partial_rotary_factor": model.rotary_pct,
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    width, shared = theirs["moe_intermediate_size"], theirs["n_shared_experts"]
    if shared < 1:
        what = "only models with shared experts can be taken over"
        raise ConfigError.of(what, key="n_shared_experts", value=shared, location="config.json")
    rotary = rotary_settings(theirs, base="rope_theta")
    found = decoder_settings({**theirs, "attention_bias": False, "mlp_bias": False}, rotary)
    groups = {"moe_router_num_groups": theirs["n_group"], "moe_router_group_topk": theirs["topk_group"]}
    return (
        found
        | {
            "use_qk_layernorm": bool(theirs["use_qk_norm"]),
            QKV_BIAS: bool(theirs["attention_bias"]),
            "moe_num_experts": several(theirs, "n_routed_experts"),
            "moe_top_k": theirs["num_experts_per_tok"],
            "moe_router_type": "topk",
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_normalize_top_k": bool(theirs["norm_topk_prob"]),
            "moe_router_topk_scaling_factor": float(theirs["routed_scaling_factor"]),
            "moe_ffn_hidden_size": width,
            _SHARED: width * shared,
            "moe_first_k_dense_replace": theirs["first_k_dense_replace"],
        }
        | (groups if theirs["n_group"] > 1 else {})
    )


def _expert_misfits(model: ModelSection, moe: MoeSection) -> list[ConfigIssue]:
    others = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    errors = expert_misfits(moe, "GLM-4-MoE", _SAID, **others)
    if (moe.moe_router_num_groups or 1) > 1 and moe.moe_router_group_experts != GROUP_EXPERTS:
        what = f"the score of a group is that of {GROUP_EXPERTS} experts in a GLM-4-MoE model"
        errors.append(ConfigIssue(what, key="moe_router_group_experts", value=moe.moe_router_group_experts))
    shared, width = moe.moe_shared_expert_intermediate_size, expert_width(model, moe)
    if not shared or shared % width:
        what = f"a GLM-4-MoE model has shared experts of {width} features each"
        errors.append(ConfigIssue(what, key=_SHARED, value=shared))
    return errors


def _experts_config(model: ModelSection, moe: MoeSection) -> Settings:
    width = expert_width(model, moe)
    return {
        "n_routed_experts": moe.moe_num_experts,
        "num_experts_per_tok": moe.moe_top_k,
        "norm_topk_prob": moe.moe_normalize_top_k,
        "routed_scaling_factor": moe.moe_router_topk_scaling_factor,
        "n_group": moe.moe_router_num_groups or 1,
        "topk_group": moe.moe_router_group_topk or 1,
        "moe_intermediate_size": width,
        "n_shared_experts": (moe.moe_shared_expert_intermediate_size or 0) // width,
        "first_k_dense_replace": moe.moe_first_k_dense_replace,
        "num_nextn_predict_layers": 0,
    }


GLM4_MOE = ModelFamily(
    name="glm4_moe",
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=replace(NAMES, head_norms=HEAD_NORMS, experts=expert_rows("shared_experts")).table,
    spare=(".rotary_emb.inv_freq",),
    spare_blocks=True,
    parts=frozenset({QKV_BIAS}),
    prefix="model.",
    experts=ExpertsMapping(_expert_misfits, _experts_config),
)
