"""GLM-4-MoE: `Glm4MoeForCausalLM`, of GLM-4.5 and 4.6.

LLaMA's attention with rotary positions in a part of each head; DeepSeek-V3's experts: sigmoid scores, groups, a scaling
factor, a correction bias and shared experts, behind some dense blocks. The blocks behind the last one, which predict
further tokens, are left out, as transformers leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.checkpoint.huggingface.balanced_experts import balanced_config, balanced_misfits, balanced_settings
from megatron.checkpoint.huggingface.expert_tables import expert_rows
from megatron.checkpoint.huggingface.family import QKV_BIAS, ExpertsMapping, ModelFamily, Settings
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_misfits, decoder_settings
from megatron.checkpoint.huggingface.qwen import HEAD_NORMS
from megatron.checkpoint.huggingface.rope_config import rotary_settings
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigIssue


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
    rotary = rotary_settings(theirs, base="rope_theta")
    found = decoder_settings({**theirs, "attention_bias": False, "mlp_bias": False}, rotary)
    own = {"use_qk_layernorm": bool(theirs["use_qk_norm"]), QKV_BIAS: bool(theirs["attention_bias"])}
    return found | own | balanced_settings(theirs)


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
    experts=ExpertsMapping(lambda model, moe: balanced_misfits(model, moe, "GLM-4-MoE"), balanced_config),
)
