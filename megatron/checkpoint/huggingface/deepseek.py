"""DeepSeek V2 and V3: `DeepseekV2ForCausalLM`, `DeepseekV3ForCausalLM`.

LLaMA's blocks with latent attention, and experts behind some dense blocks: in V2 with softmax scores, in V3 with
sigmoid scores and a correction bias. Their rotary positions turn neighbouring features, ours those half a head apart;
`rope_interleave: false` of V3 says the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.huggingface.balanced_experts import (
    balanced_config,
    balanced_misfits,
    balanced_settings,
    grouped_config,
    grouped_misfits,
    grouped_settings,
)
from megatron.checkpoint.huggingface.expert_tables import CONFIG, expert_rows
from megatron.checkpoint.huggingface.family import (
    ExpertsMapping,
    ModelFamily,
    Settings,
    TensorMapping,
    check_config,
    same,
)
from megatron.checkpoint.huggingface.llama import NAMES, decoder_config, decoder_misfits, decoder_settings
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.errors import ConfigError, ConfigIssue
from megatron.param_table import LatentDims, ModelDims

LATENT_EPSILON = 1e-6
"""Of the norms of latents, whatever rms_norm_eps says."""
GREEDY, LIMITED = "greedy", "group_limited_greedy"
_LATENT = "multi_latent_attention"


def _misfits(model: ModelSection, family: str) -> list[ConfigIssue]:
    others = {"sliding_window_width": None, "use_bias_in_mlp": False, "use_qk_layernorm": False, _LATENT: True}
    errors = decoder_misfits(model, family, **others)
    if model.rms_norm_epsilon != LATENT_EPSILON:
        what = f"the norms of latents of a {family} model have {LATENT_EPSILON}"
        errors.append(ConfigIssue(what, key="rms_norm_epsilon", value=model.rms_norm_epsilon))
    return errors


def _config(model: ModelSection, padded_vocab_size: int) -> Settings:
    return decoder_config(model, padded_vocab_size) | {
        "head_dim": model.qk_pos_emb_head_dim,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_head_dim,
        "qk_rope_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.v_head_dim,
        "attention_bias": model.use_bias_in_attn_linear,
    }


def _settings(theirs: Mapping[str, Any]) -> Settings:
    heads = theirs["num_attention_heads"]
    check_config(theirs, {"num_key_value_heads": heads, "mlp_bias": False, "moe_layer_freq": 1})
    if theirs["rms_norm_eps"] != LATENT_EPSILON:
        what = f"the norms of latents have {LATENT_EPSILON} in transformers, and here all have the same"
        raise ConfigError.of(what, key="rms_norm_eps", value=theirs["rms_norm_eps"], location=CONFIG)
    plain, rotary = theirs["qk_nope_head_dim"], theirs["qk_rope_head_dim"]
    attention = {"num_key_value_heads": heads, "head_dim": plain + rotary, "mlp_bias": False}
    found = decoder_settings({**theirs, **attention}) | {
        _LATENT: True,
        "kv_lora_rank": theirs["kv_lora_rank"],
        "qk_head_dim": plain,
        "qk_pos_emb_head_dim": rotary,
        "v_head_dim": theirs["v_head_dim"],
    }
    return found | ({} if theirs["q_lora_rank"] is None else {"q_lora_rank": theirs["q_lora_rank"]})


def _attention_rows(*, interleaved: bool) -> Callable[[ModelDims, str, str], list[TensorMapping]]:
    """Returns the rows of a block's projections to and from latents.

    interleaved: whether theirs have the two features of a rotated pair side by side.
    """

    def rows(dims: ModelDims, ours: str, theirs: str) -> list[TensorMapping]:
        latent = dims.latent or LatentDims(0, 0, 0, 0)
        kinds = ("weight", "bias") if dims.has_qkv_bias else ("weight",)
        own, other = f"{ours}attention.", f"{theirs}self_attn."
        turned = latent.rotary if interleaved else 0
        heads = dims.num_attention_heads
        found = []
        if latent.query_rank:
            found += [same(f"{own}q_down_proj.{kind}", f"{other}q_a_proj.{kind}") for kind in kinds]
            found.append(same(f"{own}q_layernorm.scale", f"{other}q_a_layernorm.weight"))
            found.append(_rotated(f"{own}q_up_proj.weight", f"{other}q_b_proj.weight", heads, turned))
        else:
            found.append(_rotated(f"{own}q_proj.weight", f"{other}q_proj.weight", heads, turned))
        down = f"{other}kv_a_proj_with_mqa"
        found += [_rotated(f"{own}kv_down_proj.{kind}", f"{down}.{kind}", 1, turned) for kind in kinds]
        found.append(same(f"{own}kv_layernorm.scale", f"{other}kv_a_layernorm.weight"))
        return [*found, same(f"{own}kv_up_proj.weight", f"{other}kv_b_proj.weight")]

    return rows


def _rotated(ours: str, theirs: str, heads: int, width: int) -> TensorMapping:
    """The rows of some heads, each with its rotated features last; theirs have pairs of these side by side.

    Args:
        ours: Our name.
        theirs: Their name.
        heads: Number of heads.
        width: Rotated features of a head; 0 where both have the same order.
    """
    if width == 0:
        return same(ours, theirs)

    def reordered(rows: Tensor, sizes: tuple[int, int]) -> Tensor:
        by_head = rows.unflatten(0, (heads, -1))
        plain, rotated = by_head.split((by_head.shape[1] - width, width), dim=1)
        return torch.cat((plain, rotated.unflatten(1, sizes).transpose(1, 2).flatten(1, 2)), dim=1).flatten(0, 1)

    def together(tensors: Sequence[Tensor]) -> Tensor:
        return reordered(tensors[0], (width // 2, 2))

    return TensorMapping(ours, (theirs,), lambda tensor: (reordered(tensor, (2, width // 2)),), together)


NAMES_PAIRED = replace(NAMES, projections=_attention_rows(interleaved=True), experts=expert_rows("shared_experts"))
NAMES_HALVES = replace(NAMES_PAIRED, projections=_attention_rows(interleaved=False))


def _v3_settings(theirs: Mapping[str, Any]) -> Settings:
    check_config(theirs, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    return _settings(theirs) | balanced_settings(theirs)


DEEPSEEK_V3 = ModelFamily(
    name="deepseek_v3",
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    misfits=lambda model: _misfits(model, "DeepSeek-V3"),
    config=lambda model, rows: _config(model, rows) | {"rope_interleave": True},
    settings=_v3_settings,
    table=NAMES_PAIRED.table,
    table_of=lambda theirs: (NAMES_PAIRED if theirs["rope_interleave"] else NAMES_HALVES).table,
    spare=(".rotary_emb.inv_freq",),
    spare_blocks=True,
    parts=frozenset({_LATENT, "mtp_num_layers"}),
    prefix="model.",
    experts=ExpertsMapping(
        lambda model, moe: balanced_misfits(model, moe, "DeepSeek-V3"),
        lambda model, moe: balanced_config(model, moe) | {"num_nextn_predict_layers": model.mtp_num_layers or 0},
    ),
)


def _v2_settings(theirs: Mapping[str, Any]) -> Settings:
    check_config(theirs, {"scoring_func": "softmax", "norm_topk_prob": False})
    method, groups = theirs["topk_method"], theirs["n_group"] or 1
    if method not in (GREEDY, LIMITED):
        raise ConfigError.of(f"it is {GREEDY} or {LIMITED}", key="topk_method", value=method, location=CONFIG)
    several = method == LIMITED and groups > 1
    found = _settings(theirs) | grouped_settings({**theirs, "n_group": groups if several else 1})
    return found | ({"moe_router_group_experts": 1} if several else {})


def _v2_expert_misfits(model: ModelSection, moe: MoeSection) -> list[ConfigIssue]:
    return grouped_misfits(model, moe, "DeepSeek-V2", group_experts=1, moe_normalize_top_k=False)


def _v2_experts_config(model: ModelSection, moe: MoeSection) -> Settings:
    method = LIMITED if (moe.moe_router_num_groups or 1) > 1 else GREEDY
    return grouped_config(model, moe) | {"topk_method": method}


DEEPSEEK_V2 = ModelFamily(
    name="deepseek_v2",
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    misfits=lambda model: _misfits(model, "DeepSeek-V2"),
    config=lambda model, rows: _config(model, rows) | {"mlp_bias": False},
    settings=_v2_settings,
    table=NAMES_PAIRED.table,
    spare=(".rotary_emb.inv_freq",),
    parts=frozenset({_LATENT}),
    prefix="model.",
    experts=ExpertsMapping(_v2_expert_misfits, _v2_experts_config),
)
