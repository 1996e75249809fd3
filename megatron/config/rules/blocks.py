"""Rules about what is handed to DeepSpeed as it stands, and about parts of a whole."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.config.deepspeed_json import deepspeed_config
from megatron.errors import ConfigError, Mistake


def warmup_is_a_part(config: Config) -> Iterator[Mistake]:
    """The warmup is a part of the decay horizon, though other programs count it in steps."""
    warmup, horizon = config.schedule.warmup, config.schedule.lr_decay_iters
    if 0 <= warmup <= 1:
        return
    remedy = "it is a part of the decay horizon, such as 0.01"
    if warmup > 1 and horizon and horizon > warmup:
        remedy = f"it is a part of the decay horizon: {warmup:g} of {horizon:,} steps are {warmup / horizon:.3g}"
    yield Mistake("it must lie between 0 and 1", key="warmup", value=warmup, remedy=remedy)


def extra_arguments_only_add(config: Config) -> Iterator[Mistake]:
    """`deepspeed_extra_args` may not change what other keys decide."""
    if not config.deepspeed.deepspeed_extra_args:
        return
    try:
        deepspeed_config(config)
    except ConfigError as fault:
        yield from fault.mistakes
