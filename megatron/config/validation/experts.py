"""Rules for mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.config.schema.moe import MoeSection
from megatron.errors import ConfigIssue
from megatron.registry import BALANCES_ITSELF, ROUTERS, WITHOUT_MLP

MOST_EXPERTS = 4096
OF_TOPK = (
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
)
"""Keys that only a router with plain scores reads."""
FIELDS_OF_MOE = MoeSection.model_fields


def experts_limit_zero(config: Config) -> Iterator[ConfigIssue]:
    """Experts have process groups of their own, which ZeRO 3 does not support; DeepSpeed asserts the rest."""
    moe, zero = config.moe, config.deepspeed.zero_optimization or {}
    if moe.moe_expert_parallel_size == 1:
        return
    if config.deepspeed.zero_stage == 3:
        yield ConfigIssue(
            "ZeRO 3 shards parameters over all data-parallel ranks, also those that hold other experts",
            key="zero_optimization",
            value=zero,
            hint="use stage 0, 1 or 2, or moe_expert_parallel_size: 1",
        )
    for name in ("reduce_scatter", "contiguous_gradients"):  # without the second one gradients are silently wrong
        if config.deepspeed.zero_stage in (1, 2) and zero.get(name) is False:
            yield ConfigIssue(
                f"DeepSpeed needs {name} where experts are sharded over ranks",
                key="zero_optimization",
                value=zero,
                hint=f"leave {name} out, or set moe_expert_parallel_size: 1",
            )
    if zero.get("offload_optimizer"):
        yield ConfigIssue(
            "DeepSpeed's norm of offloaded gradients does not count experts that are sharded over ranks",
            key="zero_optimization",
            value=zero,
            hint="leave offload_optimizer out, or set moe_expert_parallel_size: 1",
        )


def tokens_choose_among_experts(config: Config) -> Iterator[ConfigIssue]:
    """A token has at most all experts, and every rank has the same number of them."""
    moe, axes = config.moe, config.parallelism
    for name in ("moe_expert_interval", "moe_expert_parallel_size"):
        if getattr(moe, name) < 1:
            yield ConfigIssue("it must be at least 1", key=name, value=getattr(moe, name))
            return
    if moe.moe_num_experts <= 1:
        if moe.moe_expert_parallel_size > 1:
            yield ConfigIssue(
                "there are no experts to shard (moe_num_experts = 1)",
                key="moe_expert_parallel_size",
                value=moe.moe_expert_parallel_size,
                hint="give moe_num_experts, or leave it out",
            )
        return
    if moe.moe_num_experts > MOST_EXPERTS:
        yield ConfigIssue(f"at most {MOST_EXPERTS:,}", key="moe_num_experts", value=moe.moe_num_experts)
        return
    if moe.moe_top_k > moe.moe_num_experts:
        yield ConfigIssue(f"there are {moe.moe_num_experts} experts", key="moe_top_k", value=moe.moe_top_k)
    for name, value in (("moe_normalize_top_k", True), ("moe_router_pre_softmax", False)):
        if getattr(moe, name) is value and moe.moe_top_k == 1:
            yield ConfigIssue(
                "the weight of a single expert would always be 1, and the router would learn nothing",
                key=name,
                value=value,
                hint="leave it out, or raise moe_top_k",
            )
    size, copies = moe.moe_expert_parallel_size, axes.data_parallel_size * axes.context_parallel_size
    if moe.moe_num_experts % size:
        yield ConfigIssue(
            f"it does not divide moe_num_experts = {moe.moe_num_experts}", key="moe_expert_parallel_size", value=size
        )
    if copies % size:
        yield ConfigIssue(
            f"experts are sharded over data-parallel ranks, of which there are {copies}",
            key="moe_expert_parallel_size",
            value=size,
            hint=f"choose a divisor of {copies}",
        )


def router_numbers_make_sense(config: Config) -> Iterator[ConfigIssue]:
    """Capacities are positive, the jitter is below 1, coefficients are not negative."""
    moe = config.moe
    for name in ("moe_capacity_factor", "moe_eval_capacity_factor"):
        value = getattr(moe, name)
        if value is not None and value <= 0:
            yield ConfigIssue("it must be more than 0", key=name, value=value, hint="leave it out to drop no token")
    for name in (
        "moe_aux_loss_coeff",
        "moe_seq_aux_loss_coeff",
        "moe_global_aux_loss_coeff",
        "moe_z_loss_coeff",
        "moe_min_capacity",
    ):
        if getattr(moe, name) < 0:
            yield ConfigIssue("it cannot be negative", key=name, value=getattr(moe, name))
    if moe.moe_jitter_eps is not None and not 0 <= moe.moe_jitter_eps < 1:
        yield ConfigIssue("it must be between 0 and 1", key="moe_jitter_eps", value=moe.moe_jitter_eps)
    for name in ("moe_router_topk_scaling_factor", "moe_router_bias_update_rate"):
        if getattr(moe, name) <= 0:
            yield ConfigIssue("it must be more than 0", key=name, value=getattr(moe, name))


def blocks_with_experts_exist(config: Config) -> Iterator[ConfigIssue]:
    """A list of blocks has one entry each, and says nothing that other keys say; some block has experts."""
    moe, kinds = config.moe, list(map(str, config.model.attention_config or ()))
    if moe.moe_num_experts <= 1:
        return
    listed, first = moe.moe_layer_freq, moe.moe_first_k_dense_replace
    if first < 0:
        yield ConfigIssue("it cannot be negative", key="moe_first_k_dense_replace", value=first)
        return
    if listed is not None:
        if len(listed) != len(kinds) or set(listed) - {0, 1}:
            message = f"it takes a 1 or a 0 for each of the {len(kinds)} blocks"
            yield ConfigIssue(message, key="moe_layer_freq", value=list(listed))
            return
        for name, usual in (("moe_expert_interval", 1), ("moe_first_k_dense_replace", 0)):
            if getattr(moe, name) != usual:
                message = "moe_layer_freq names the blocks with experts"
                yield ConfigIssue(message, key=name, value=getattr(moe, name), hint="leave one of the two out")
    attending = [number for number, kind in enumerate(kinds) if kind not in WITHOUT_MLP]
    if kinds and not any(map(moe.has_experts, attending)):
        given = "moe_layer_freq" if listed is not None else "moe_first_k_dense_replace" if first else "moe_num_experts"
        message = "no block with an MLP has experts"
        yield ConfigIssue(
            message, key=given, value=getattr(moe, given), hint="set moe_num_experts: 1 for a dense model"
        )


def expert_widths_divide(config: Config) -> Iterator[ConfigIssue]:
    """Widths are positive and divide by the tensor-parallel size; a gate needs shared experts; muP has one width."""
    moe, ranks = config.moe, max(1, config.parallelism.model_parallel_size)
    if moe.moe_num_experts <= 1:
        return
    for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        width = getattr(moe, name)
        if width is None:
            continue
        if width < 1:
            yield ConfigIssue("it must be at least 1", key=name, value=width, hint="leave it out")
        elif width % ranks:
            yield ConfigIssue(f"model_parallel_size = {ranks} does not divide it", key=name, value=width)
        if config.mup.use_mup:
            message = "muP knows one inner width, which its base model scales"
            yield ConfigIssue(message, key=name, value=width, hint="leave it out, or leave use_mup out")
    if moe.moe_shared_expert_gate and moe.moe_shared_expert_intermediate_size is None:
        yield ConfigIssue(
            "there are no shared experts to multiply",
            key="moe_shared_expert_gate",
            value=True,
            hint="give moe_shared_expert_intermediate_size, or leave it out",
        )


def groups_hold_experts(config: Config) -> Iterator[ConfigIssue]:
    """Groups are of equal size, and the chosen ones hold the experts of a token."""
    moe = config.moe
    groups, best, of_group = moe.moe_router_num_groups, moe.moe_router_group_topk, moe.moe_router_group_experts
    if moe.moe_num_experts <= 1 or (groups is None and best is None):
        return
    if groups is None or best is None:
        given, lacking = ("moe_router_num_groups", "moe_router_group_topk")[:: 1 if best is None else -1]
        hint = f"give {lacking} too, or leave both out"
        yield ConfigIssue("groups need their number and how many a token uses", given, getattr(moe, given), hint=hint)
        return
    if groups < 1 or moe.moe_num_experts % groups:
        message = f"it does not divide moe_num_experts = {moe.moe_num_experts}"
        yield ConfigIssue(message, key="moe_router_num_groups", value=groups)
        return
    size = moe.moe_num_experts // groups
    if not 1 <= best <= groups:
        yield ConfigIssue(f"it must be between 1 and the {groups} groups", key="moe_router_group_topk", value=best)
    elif best * size < moe.moe_top_k:
        message = f"{best} groups of {size} hold fewer than the {moe.moe_top_k} experts of a token"
        yield ConfigIssue(message, key="moe_router_group_topk", value=best)
    if groups > 1 and not 1 <= of_group <= size:
        message = f"it must be between 1 and the {size} experts of a group"
        yield ConfigIssue(message, key="moe_router_group_experts", value=of_group)


def scores_belong_to_topk(config: Config) -> Iterator[ConfigIssue]:
    """Sinkhorn has its own scores and balances by itself; a bias needs scores of one scale."""
    moe = config.moe
    if moe.moe_num_experts <= 1:
        return
    if ROUTERS.entry(moe.moe_router_type).traits & BALANCES_ITSELF:
        for name in OF_TOPK:
            if getattr(moe, name) != FIELDS_OF_MOE[name].default:
                message = f"the router {moe.moe_router_type} has its own scores and assignment"
                yield ConfigIssue(message, key=name, value=getattr(moe, name), hint="set moe_router_type: topk")
        return
    if moe.moe_router_score_function == "sigmoid" and not moe.moe_router_pre_softmax:
        yield ConfigIssue(
            "sigmoid scores have no softmax",
            key="moe_router_pre_softmax",
            value=False,
            hint="leave it out, or set moe_router_score_function: softmax",
        )
    elif moe.moe_router_enable_expert_bias and not moe.moe_router_pre_softmax:
        yield ConfigIssue(
            "the bias is added to scores, and the choice is by logits, whose size nothing limits",
            key="moe_router_enable_expert_bias",
            value=True,
            hint="leave moe_router_pre_softmax out, or set moe_router_score_function: sigmoid",
        )
