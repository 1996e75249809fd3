"""Rules about what stands inside the blocks that DeepSpeed reads, and about parts of a whole."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.errors import Mistake
from megatron.registry import nearest_name

ZERO_NAMES = frozenset(
    (
        "stage",
        "allgather_bucket_size",
        "allgather_partitions",
        "allgather_sequential",
        "compute_grad_norm",
        "contiguous_gradients",
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "max_live_parameters",
        "max_reuse_distance",
        "memory_efficient_linear",
        "model_persistence_threshold",
        "module_granularity_threshold",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "param_persistence_threshold",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "prefetch_bucket_size",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
        "zenflow",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    )
)
"""What DeepSpeed 0.19 takes in the ZeRO block; a name that it does not know stops every worker."""


def zero_block_is_known(config: Config) -> Iterator[Mistake]:
    """DeepSpeed refuses unknown names in the ZeRO block, but only once the workers run."""
    for name in config.deepspeed.zero_optimization or {}:
        if name in ZERO_NAMES:
            continue
        close = nearest_name(str(name), ZERO_NAMES)
        remedy = f"did you mean {close}?" if close else "leave it out"
        what = f"DeepSpeed knows no {name} in this block"
        yield Mistake(what, key="zero_optimization", value=config.deepspeed.zero_optimization, remedy=remedy)


def warmup_is_a_part(config: Config) -> Iterator[Mistake]:
    """The warmup is a part of the decay horizon, though other programs count it in steps."""
    warmup, horizon = config.schedule.warmup, config.schedule.lr_decay_iters
    if 0 <= warmup <= 1:
        return
    remedy = "it is a part of the decay horizon, such as 0.01"
    if warmup > 1 and horizon and horizon > warmup:
        remedy = f"it is a part of the decay horizon: {warmup:g} of {horizon:,} steps are {warmup / horizon:.3g}"
    yield Mistake("it must lie between 0 and 1", key="warmup", value=warmup, remedy=remedy)
