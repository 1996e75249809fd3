"""Rules about what is handed to DeepSpeed as it stands, and about parts of a whole."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.config.deepspeed_json import deepspeed_config
from megatron.errors import ConfigError, Mistake


def extra_arguments_only_add(config: Config) -> Iterator[Mistake]:
    """`deepspeed_extra_args` may not change what other keys decide."""
    if not config.deepspeed.deepspeed_extra_args:
        return
    try:
        deepspeed_config(config)
    except ConfigError as fault:
        yield from fault.mistakes
