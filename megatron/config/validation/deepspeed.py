"""Rules for settings that are passed to DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.config.deepspeed_config import deepspeed_config
from megatron.errors import ConfigError, ConfigIssue
from megatron.registry import OPTIMIZERS


def offload_is_possible(config: Config) -> Iterator[ConfigIssue]:
    """ZeRO can offload what it shards; DeepSpeed ignores other requests, or fails in the workers."""
    block, stage = config.deepspeed.zero_optimization or {}, config.deepspeed.zero_stage
    on_cpu = "cpu_offload" in OPTIMIZERS.entry(config.optimizer.optimizer_type).traits
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        given = block.get(name)
        offload = given if isinstance(given, dict) else {"device": given}
        device = offload.get("device")
        if device in (None, "none"):
            continue
        needed = 3 if device == "nvme" else least
        message, hint = None, ""
        if device not in ("cpu", "nvme"):
            message, hint = f"{name} knows no device {device!r}", "write device: cpu, nvme or none"
        elif device == "nvme" and not offload.get("nvme_path"):
            message, hint = f"{name} has no nvme_path", "name the folder of the disk to use"
        elif isinstance(stage, int) and stage < needed:
            message, hint = (
                f"{name} to {device} needs stage {needed}",
                f"use stage {needed}" + " or more" * (needed < 3),
            )
        elif offload.get("ratio", 1) != 1 and not on_cpu:
            message, hint = f"an {name} of ratio {offload['ratio']} needs DeepSpeed's own Adam", "leave ratio out"
        if message is not None:
            yield ConfigIssue(message, key="zero_optimization", value=block, hint=hint)


def secondary_partitions_divide_ranks(config: Config) -> Iterator[ConfigIssue]:
    """Groups of ranks that each keep all weights (`zero_hpz_partition_size`) exist at ZeRO 3, and are equal."""
    block, axes = config.deepspeed.zero_optimization or {}, config.parallelism
    size = block.get("zero_hpz_partition_size", 1)
    message, hint = None, ""
    if type(size) is not int or size < 1:
        message, hint = (
            f"zero_hpz_partition_size counts ranks, and is {size!r}",
            "give a number of ranks, or leave it out",
        )
    elif size > 1 and config.deepspeed.zero_stage != 3:
        message, hint = (
            "zero_hpz_partition_size needs stage 3, which partitions weights",
            "use stage 3, or leave it out",
        )
    elif size > 1 and axes.data_parallel_size % size:
        sizes = [str(each) for each in range(2, axes.data_parallel_size + 1) if axes.data_parallel_size % each == 0]
        message = (
            f"zero_hpz_partition_size = {size} does not divide the {axes.data_parallel_size} ranks that share weights"
        )
        hint = f"give {' or '.join(sizes)}" if sizes else "leave it out"
    if message is not None:
        yield ConfigIssue(message, key="zero_optimization", value=block, hint=hint)


def extra_arguments_only_add(config: Config) -> Iterator[ConfigIssue]:
    """`deepspeed_extra_args` may not change what other keys decide."""
    axes, batch = config.parallelism, config.training.train_batch_size
    if not config.deepspeed.deepspeed_extra_args or batch is None or axes.context_parallel_size is None:
        return  # reading an unknown size skips the rule
    try:
        deepspeed_config(config)
    except ConfigError as error:
        yield from error.issues
