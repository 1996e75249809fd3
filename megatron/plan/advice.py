"""Suggests configuration changes when a rank needs more memory than it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron.config import Config
from megatron.plan.memory import Memory

Estimate = Callable[[Config], Memory]


def advice(config: Config, estimate: Estimate, budget: int) -> list[str]:
    """Returns changes that lower the memory of a rank, the most effective first, with their memory.

    config: the configuration. estimate: returns the memory of a configuration. budget: memory of a rank [bytes].
    """
    found = []
    for change, changed in _changes(config):
        needed = estimate(changed).total
        found.append((needed, change))
    found.sort()
    return [
        f"{change}: {gib(needed)} a rank{'' if needed <= budget else ', still too much alone'}"
        for needed, change in found[:4]
    ]


def gib(size: int | float) -> str:
    """Formats bytes in GiB, or in MiB below one GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _changes(config: Config) -> Iterator[tuple[str, Config]]:
    axes, training, model = config.parallelism, config.training, config.model
    assert axes.world_size
    assert training.train_micro_batch_size_per_gpu
    stage = config.deepspeed.zero_stage
    if not config.recompute.checkpoint_activations:
        yield "checkpoint_activations: true", config.replace(checkpoint_activations=True)
    if isinstance(stage, int) and axes.data_parallel_size > 1:
        limit = 1 if axes.is_pipe_parallel else 2 if config.moe.moe_expert_parallel_size > 1 else 3
        for higher in range(stage + 1, limit + 1):
            block = {**(config.deepspeed.zero_optimization or {}), "stage": higher}
            change = f"zero_optimization: {{stage: {higher}}}"
            yield change, config.replace(zero_optimization=block, zero_stage=higher)
    micro = training.train_micro_batch_size_per_gpu
    if micro > 1:
        change = f"train_micro_batch_size_per_gpu: {micro // 2} with twice the gradient accumulation"
        yield change, config.replace(train_micro_batch_size_per_gpu=micro // 2)
    wider = max(1, axes.model_parallel_size) * 2
    heads = model.num_attention_heads or 0
    kv_heads = model.num_kv_heads or heads
    if (
        axes.data_parallel_size % 2 == 0
        and heads % wider == 0
        and (kv_heads % wider == 0 or (wider % kv_heads == 0 and (model.kv_channels or 0) % (wider // kv_heads) == 0))
        and model.mlp_width % wider == 0
    ):
        yield f"model_parallel_size: {wider}", config.replace(model_parallel_size=wider)
    if config.precision.precision == "fp32":
        yield "precision: bfloat16", _bfloat16(config)


def _bfloat16(config: Config) -> Config:
    block = dict(config.deepspeed.zero_optimization or {})
    stage = max(1, int(block.get("stage", 0)))
    return config.replace(precision="bfloat16", zero_optimization={**block, "stage": stage}, zero_stage=stage)
