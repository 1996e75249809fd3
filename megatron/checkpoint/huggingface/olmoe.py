"""OLMoE: `OlmoeForCausalLM`. LLaMA's blocks with one norm over all heads of queries and of keys, and experts in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.checkpoint.huggingface.expert_keys import expert_misfits
from megatron.checkpoint.huggingface.expert_tables import expert_rows, expert_width, router_config, router_settings
from megatron.checkpoint.huggingface.family import ExpertsMapping, ModelFamily, Settings, check_config
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_misfits, decoder_settings
from megatron.checkpoint.huggingface.qwen import HEAD_NORMS
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.errors import ConfigIssue

_OTHERS = {"use_qk_layernorm": True, "qk_layernorm_across_heads": True, "use_bias_in_mlp": False}


def _misfits(model: ModelSection) -> list[ConfigIssue]:
    return decoder_misfits(model, "OLMoE", **_OTHERS, sliding_window_width=None)


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return decoder_config(model, padded_vocab_size) | {"attention_bias": model.use_bias_in_attn_linear}


def _settings(theirs: Mapping[str, Any]) -> Settings:
    check_config(theirs, {"clip_qkv": None})
    return decoder_settings({**theirs, "mlp_bias": False}) | _OTHERS | router_settings(theirs, "num_experts")


def _expert_misfits(model: ModelSection, moe: MoeSection) -> list[ConfigIssue]:
    return expert_misfits(moe, "OLMoE", frozenset({"moe_ffn_hidden_size"}))


def _experts_config(model: ModelSection, moe: MoeSection) -> Settings:
    """Their experts have the width that other models give their plain MLP."""
    return router_config(moe) | {
        "num_experts": moe.moe_num_experts,
        "intermediate_size": expert_width(model, moe),
    }


OLMOE = ModelFamily(
    name="olmoe",
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    misfits=_misfits,
    config=_config,
    settings=_settings,
    table=replace(NAMES, head_norms=HEAD_NORMS, experts=expert_rows()).table,
    spare=(".rotary_emb.inv_freq",),
    parts=frozenset({"qk_layernorm_across_heads"}),
    class_pads=True,
    prefix="model.",
    experts=ExpertsMapping(_expert_misfits, _experts_config),
)
