"""Number format and loss scaling, derived from the blocks fp16 and bf16."""

from __future__ import annotations

from typing import Any

from megatron.errors import ConfigError

Table = dict[str, Any]


def derive_precision(precision: str | None, fp16: Table | None, bf16: Table | None) -> str:
    """Returns fp16, bfloat16 or fp32. Raises ConfigError where the key and the blocks contradict each other."""
    requested = {name for name, block in (("fp16", fp16), ("bfloat16", bf16)) if block and block.get("enabled")}
    if len(requested) == 2:
        raise ConfigError.of("fp16 and bf16 are both enabled", key="fp16", value=fp16, hint="enable one of them")
    if requested and precision is not None and precision not in requested:
        enabled = requested.pop()
        block = "bf16" if enabled == "bfloat16" else "fp16"
        raise ConfigError.of(
            f"the block {block} is enabled as well",
            key="precision",
            value=precision,
            hint=f"write precision: {enabled}, or set enabled: false in {block}",
        )
    return precision or (requested.pop() if requested else "fp32")


def fp16_block(precision: str, fp16: Table | None) -> Table | None:
    """Returns DeepSpeed's fp16 block: enabled exactly when the precision is fp16."""
    if precision == "fp16":
        return {**(fp16 or {"type": "fp16"}), "enabled": True}
    return fp16


def bf16_block(precision: str, bf16: Table | None) -> Table | None:
    """Returns DeepSpeed's bf16 block: enabled exactly when the precision is bfloat16."""
    if precision == "bfloat16":
        return {**(bf16 or {}), "enabled": True}
    return bf16
