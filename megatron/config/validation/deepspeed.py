"""Rules about what is handed to DeepSpeed as it stands, and about parts of a whole."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.config.deepspeed_config import deepspeed_config
from megatron.errors import ConfigError, ConfigIssue
from megatron.registry import OPTIMIZERS


def offload_is_possible(config: Config) -> Iterator[ConfigIssue]:
    """ZeRO can move away what it has cut; DeepSpeed overlooks other wishes, or fails in the workers."""
    block, stage = config.deepspeed.zero_optimization or {}, config.deepspeed.zero_stage
    by_host = "host" in OPTIMIZERS.entry(config.optimizer.optimizer_type).traits
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        wish = block.get(name)
        wish = wish if isinstance(wish, dict) else {"device": wish}
        device = wish.get("device")
        if device in (None, "none"):
            continue
        needed = 3 if device == "nvme" else least
        told = None
        if device not in ("cpu", "nvme"):
            told = f"{name} knows no device {device!r}", "write device: cpu, nvme or none"
        elif device == "nvme" and not wish.get("nvme_path"):
            told = f"{name} has no nvme_path", "name the folder of the disk to use"
        elif isinstance(stage, int) and stage < needed:
            told = f"{name} to {device} needs stage {needed}", f"use stage {needed}" + " or more" * (needed < 3)
        elif wish.get("ratio", 1) != 1 and not by_host:
            told = f"an {name} of ratio {wish['ratio']} needs DeepSpeed's own Adam", "leave ratio out"
        if told is not None:
            yield ConfigIssue(told[0], key="zero_optimization", value=block, hint=told[1])


def extra_arguments_only_add(config: Config) -> Iterator[ConfigIssue]:
    """`deepspeed_extra_args` may not change what other keys decide."""
    if not config.deepspeed.deepspeed_extra_args:
        return
    try:
        deepspeed_config(config)
    except ConfigError as error:
        yield from error.issues
