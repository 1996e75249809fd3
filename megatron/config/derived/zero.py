"""Checks the ZeRO block and fills in its defaults."""

from __future__ import annotations

from typing import Any

from megatron.errors import ConfigError, ConfigIssue
from megatron.registry import nearest_name

Table = dict[str, Any]

HALF = ("bfloat16", "fp16")

REDUCTION_BUCKET = 500_000_000  # [elements] DeepSpeed's default

OLDER_OFFLOAD = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
"""Offload switches of older DeepSpeed releases -> their names today."""

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
"""Names of the ZeRO block in DeepSpeed 0.19; it rejects others in every worker."""


def derive_zero(precision: str, zero: Table | None, *, tuned: bool = False) -> Table:
    """Returns the ZeRO block. The default is stage 0, but stage 1 for bfloat16 and fp16, whose fp32 weights need it.

    A given stage 0 becomes 1 in 16 bits as well: without ZeRO DeepSpeed neither sums 16-bit gradients in fp32 nor
    counts their norm over pipeline stages, and the two stages compute the same. Raises ConfigError for a block without
    a stage, or with one that does not exist.

    precision: "" where it is unknown. tuned: the autotuner accepts a list of stages, or "all".
    """
    if zero is None:
        return {
            "stage": 0 if precision == "fp32" else 1,
            "allgather_partitions": True,
            "allgather_bucket_size": 500_000_000,
            "overlap_comm": False,
            "reduce_scatter": True,
            "reduce_bucket_size": REDUCTION_BUCKET,
            "contiguous_gradients": False,
        }
    ConfigError.raise_any([*_stage_issues(zero, tuned=tuned), *_name_issues(zero)])
    for old, name in OLDER_OFFLOAD.items():
        if zero.get(old) is True:
            zero = {name: {"device": "cpu"}, **{key: value for key, value in zero.items() if key != old}}
    return {**zero, "stage": 1} if precision in HALF and zero["stage"] == 0 else zero


def _stage_issues(zero: Table, *, tuned: bool) -> list[ConfigIssue]:
    stage = zero.get("stage")
    if stage is None:
        if any(nearest_name(str(name), ZERO_NAMES) == "stage" for name in zero if name not in ZERO_NAMES):
            return []  # a misspelt stage, reported by its name
        return [ConfigIssue("the block has no stage", "zero_optimization", zero, hint="add stage: 0, 1, 2 or 3")]
    stages = stage if tuned and isinstance(stage, list) else [stage]
    if all(type(one) in (int, float) and one in (0, 1, 2, 3) for one in stages) or (tuned and stage == "all"):
        return []
    what = f"there is no ZeRO stage {stage!r}"
    return [ConfigIssue(what, "zero_optimization", zero, hint="the stages are 0, 1, 2 and 3")]


def _name_issues(zero: Table) -> list[ConfigIssue]:
    """Returns the issues of unknown names, which DeepSpeed would reject only in the workers."""
    issues = []
    for name in zero:
        if name not in ZERO_NAMES:
            close = nearest_name(str(name), ZERO_NAMES)
            hint = f"did you mean {close}?" if close else "leave it out"
            what = f"DeepSpeed knows no {name} in this block"
            issues.append(ConfigIssue(what, "zero_optimization", zero, hint=hint))
    return issues
