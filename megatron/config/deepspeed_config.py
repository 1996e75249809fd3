"""Converts a Config to the DeepSpeed configuration, a mapping.

The optimizer and its schedule are passed to DeepSpeed as objects, so neither appears here. At ZeRO 0 the gradient norm
and the clipping are computed outside DeepSpeed, whose norm is wrong there with a pipeline. Context-parallel ranks are
data-parallel ranks to DeepSpeed, so it counts every sample once for each of them. `deepspeed_extra_args` adds to the
mapping and may not change its values.
"""

from __future__ import annotations

from typing import Any

from megatron.config.config import FIELDS, Config
from megatron.errors import ConfigError, ConfigIssue

PASSTHROUGH_KEYS = (
    "prescale_gradients",
    "gradient_predivide_factor",
    "communication_data_type",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "autotuning",
    "activation_checkpointing",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "checkpoint",
    "data_types",
)
"""Keys that DeepSpeed reads under the same name; defaults are left out."""


def deepspeed_config(config: Config) -> dict[str, Any]:
    """Returns the DeepSpeed configuration. Raises ConfigError where deepspeed_extra_args contradicts it."""
    values = config.flat()
    settings: dict[str, Any] = {
        "train_batch_size": values["train_batch_size"] * values["context_parallel_size"],
        "train_micro_batch_size_per_gpu": values["train_micro_batch_size_per_gpu"],
        "gradient_accumulation_steps": values["gradient_accumulation_steps"],
        "zero_optimization": values["zero_optimization"],
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0 if values["zero_stage"] == 0 else values["gradient_clipping"],
        "steps_per_print": _steps_per_print(config),
        "wall_clock_breakdown": values["wall_clock_breakdown"],
    }
    if (values["zero_optimization"] or {}).get("offload_optimizer"):
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW is one kernel on a CPU as well
    if values["precision"] == "bfloat16":
        settings["bf16"] = values["bf16"]
    if values["precision"] == "fp16":
        settings["fp16"] = {name: value for name, value in values["fp16"].items() if name not in {"type", "fp16"}}
    if values["sequence_parallel"] and values["is_pipe_parallel"]:
        # Each tensor-parallel rank sends its own shard of the sequence; DeepSpeed would send a slice of rank 0's.
        settings["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if values["fp32_allreduce"]:
        settings["communication_data_type"] = "fp32"
    for name in PASSTHROUGH_KEYS:
        if values[name] != FIELDS[name].default:
            settings[name] = values[name]
    extra = values["deepspeed_extra_args"] or {}
    if settings["steps_per_print"] is None and "timers" not in extra:
        settings["timers"] = {"throughput": {"enabled": False}}  # it waits for the device before and after every step
    ConfigError.raise_any(
        ConfigIssue(
            f"{name} = {value!r} contradicts {name} = {settings.get(name, values.get(name))!r}",
            key="deepspeed_extra_args",
            value=extra,
            hint=f"set {name} at the top level",
        )
        for name, value in extra.items()
        if settings.get(name, value) != value
    )
    return {**settings, **extra}


def _steps_per_print(config: Config) -> int | None:
    """Returns how often DeepSpeed prints its own line: never by default."""
    section = config.deepspeed
    requested = section.wall_clock_breakdown or section.steps_per_print != FIELDS["steps_per_print"].default
    return section.steps_per_print if requested else None
