"""Experts as DeepSeek-V3 and GLM-4-MoE say them: groups, a scaling factor, a correction bias, shared experts.

DeepSeek-V2 has the same keys for softmax scores without a bias (`plain_settings` and so on).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint.huggingface.expert_keys import expert_misfits
from megatron.checkpoint.huggingface.expert_tables import CONFIG, expert_width, several
from megatron.checkpoint.huggingface.family import Settings
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


def grouped_settings(theirs: Mapping[str, Any]) -> Settings:
    """Returns our keys of the experts, without what a router makes of its logits."""
    width, shared = theirs["moe_intermediate_size"], theirs["n_shared_experts"]
    if not shared:
        what = "only models with shared experts can be taken over"
        raise ConfigError.of(what, key="n_shared_experts", value=shared, location=CONFIG)
    if theirs["num_experts_per_tok"] is None:
        raise ConfigError.of("the key is not given", key="num_experts_per_tok", location=CONFIG)
    groups = {"moe_router_num_groups": theirs["n_group"], "moe_router_group_topk": theirs["topk_group"]}
    return {
        "moe_num_experts": several(theirs, "n_routed_experts"),
        "moe_top_k": theirs["num_experts_per_tok"],
        "moe_router_type": "topk",
        "moe_router_topk_scaling_factor": float(theirs["routed_scaling_factor"]),
        "moe_ffn_hidden_size": width,
        _SHARED: width * shared,
        "moe_first_k_dense_replace": theirs["first_k_dense_replace"],
    } | (groups if (theirs["n_group"] or 1) > 1 else {})


def balanced_settings(theirs: Mapping[str, Any]) -> Settings:
    """Returns our keys of experts with sigmoid scores and a correction bias."""
    return grouped_settings(theirs) | {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_normalize_top_k": bool(theirs["norm_topk_prob"]),
    }


def grouped_misfits(
    model: ModelSection, moe: MoeSection, family: str, *, group_experts: int, **others: object
) -> list[ConfigIssue]:
    """What of a moe section such a family cannot say.

    Args:
        model: The model section.
        moe: The moe section.
        family: Its name, for messages.
        group_experts: Experts whose scores make the score of a group.
        others: Keys of which it has another value than the plain one, or one value at all.
    """
    errors = expert_misfits(moe, family, _SAID, **others)
    if (moe.moe_router_num_groups or 1) > 1 and moe.moe_router_group_experts != group_experts:
        what = f"the score of a group is that of {group_experts} experts in a {family} model"
        errors.append(ConfigIssue(what, key="moe_router_group_experts", value=moe.moe_router_group_experts))
    shared, width = moe.moe_shared_expert_intermediate_size, expert_width(model, moe)
    if not shared or shared % width:
        what = f"a {family} model has shared experts of {width} features each"
        errors.append(ConfigIssue(what, key=_SHARED, value=shared))
    return errors


def balanced_misfits(model: ModelSection, moe: MoeSection, family: str) -> list[ConfigIssue]:
    """What of a moe section a family with sigmoid scores and a correction bias cannot say; see above.

    Args:
        model: The model section.
        moe: The moe section.
        family: Its name, for messages.
    """
    others = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    return grouped_misfits(model, moe, family, group_experts=GROUP_EXPERTS, **others)


def grouped_config(model: ModelSection, moe: MoeSection) -> Settings:
    """Returns what config.json says of the experts."""
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
    }


def balanced_config(model: ModelSection, moe: MoeSection) -> Settings:
    """Returns what config.json says of experts with a correction bias; no block predicts further tokens."""
    return grouped_config(model, moe) | {"num_nextn_predict_layers": 0}
