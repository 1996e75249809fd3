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


def extra_arguments_only_add(config: Config) -> Iterator[ConfigIssue]:
    """`deepspeed_extra_args` may not change what other keys decide."""
    axes, batch = config.parallelism, config.training.train_batch_size
    if not config.deepspeed.deepspeed_extra_args or batch is None or axes.context_parallel_size is None:
        return  # reading an unknown size skips the rule
    try:
        deepspeed_config(config)
    except ConfigError as error:
        yield from error.issues
