"""Rules for frozen matrices in 4 or 8 bits (`base` in the block `lora`)."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.adapter_config import low_rank
from megatron.config.config import Config
from megatron.config.validation.fp8 import divided_widths
from megatron.errors import ConfigIssue
from megatron.registry import FROZEN_BLOCK

KEY = "lora"


def frozen_base_is_usable(config: Config) -> Iterator[ConfigIssue]:
    """Blocks of values that share a scale do not depend on the layout, and nothing but the product reads a matrix."""
    updates = low_rank(config.model.lora)
    if updates is None or updates.base is None:
        return
    value = config.model.lora
    others = {
        "dora": (updates.magnitudes, "it reads the rows of frozen matrices in each step"),
        "fp8": (config.precision.fp8 is not None, "it has another product for these matrices"),
        "compile": (config.kernels.compile, "these matrices are expanded by code that is not compiled"),
        "te_": (bool(config.transformer_engine.layers), "layers of Transformer Engine read their own weights"),
    }
    for name, (given, reason) in others.items():
        if given:
            what = f"base: {updates.base} does not go with {name}: {reason}"
            yield ConfigIssue(what, key=KEY, value=value, hint="leave one of them out")
    for name, width in divided_widths(config).items():
        if width % FROZEN_BLOCK:
            what = f"base: {updates.base} needs rows that divide by {FROZEN_BLOCK}, and {name} is {width}"
            yield ConfigIssue(what, key=KEY, value=value, hint="change it, or leave base out")
