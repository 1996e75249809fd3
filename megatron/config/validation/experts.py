"""Rules for mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.errors import ConfigIssue

MOST_EXPERTS = 4096


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
    if moe.moe_normalize_top_k and moe.moe_top_k == 1:
        yield ConfigIssue(
            "the weight of a single expert would always be 1, and the router would learn nothing",
            key="moe_normalize_top_k",
            value=True,
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
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_min_capacity"):
        if getattr(moe, name) < 0:
            yield ConfigIssue("it cannot be negative", key=name, value=getattr(moe, name))
    if moe.moe_jitter_eps is not None and not 0 <= moe.moe_jitter_eps < 1:
        yield ConfigIssue("it must be between 0 and 1", key="moe_jitter_eps", value=moe.moe_jitter_eps)
