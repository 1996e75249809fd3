"""Keys of experts that most families of `transformers` have one value of."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.checkpoint.huggingface.family import unlike
from megatron.config.schema.moe import MoeSection
from megatron.errors import ConfigIssue

PLAIN: Mapping[str, object] = {
    "moe_router_type": "topk",
    "moe_expert_interval": 1,
    "moe_first_k_dense_replace": 0,
    "moe_layer_freq": None,
    "moe_ffn_hidden_size": None,
    "moe_use_bias_in_experts": False,
    "moe_use_bias_in_router": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": True,
    "moe_router_num_groups": None,
    "moe_router_topk_scaling_factor": 1.0,
    "moe_router_enable_expert_bias": False,
}
"""What a model with a router and nothing else has."""


def expert_misfits(
    moe: MoeSection, family: str, free: frozenset[str] = frozenset(), **others: object
) -> list[ConfigIssue]:
    """What of a moe section a family cannot say.

    Args:
        moe: The moe section.
        family: Its name, for messages.
        free: Keys whose value its configuration says, or that the caller compares.
        others: Keys of which it has another value than the plain one, or one value at all.
    """
    expected = {key: value for key, value in PLAIN.items() if key not in free} | others
    errors = unlike(moe, expected, family)
    if moe.moe_num_experts == 1:
        errors.append(ConfigIssue(f"a {family} model has experts", key="moe_num_experts", value=1))
    return errors
