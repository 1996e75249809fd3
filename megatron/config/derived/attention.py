"""Expands the attention pattern `[[[kind, ...], count], ...]` to one kind per block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.errors import ConfigError

KEY = "attention_config"
TYPES = "layer_types"

CLASSES = {
    "attention": "AttentionTransformerBlock",
    "mlp": "MLPTransformerBlock",
    "mamba": "MambaTransformerBlock",
    "mamba2": "Mamba2TransformerBlock",
    "rwkv": "RWKVTransformerBlock",
    "gmlp": "GMLPTransformerBlock",
}
"""Attention kind -> class name of its block; others are a TransformerBlock."""


def expand_attention(pattern: Sequence[Any] | None, num_layers: int, key: str = KEY) -> tuple[str, ...]:
    """Returns the kind of attention, or the type, of each block.

    Each item is [kinds, count] or [kinds, "all"]; the kinds repeat, in order, `count` times. "all" fills the model and
    must be alone. A plain list of names is taken unchanged. Raises ConfigError where the pattern has another form or
    does not make `num_layers` blocks. key: the pattern's key, for messages.
    """
    if pattern is None:
        return ("global",) * num_layers
    if all(isinstance(item, str) for item in pattern):
        kinds = tuple(pattern)
    else:
        kinds = tuple(kind for item in pattern for kind in _expand_item(item, pattern, num_layers, key))
    if len(kinds) != num_layers:
        named = kinds == tuple(pattern)
        hint = f"write [[[{', '.join(dict.fromkeys(kinds))}], all]]" if named else "let the counts add up"
        blocks = "1 block" if len(kinds) == 1 else f"{len(kinds)} blocks"
        raise _error(key, pattern, f"this makes {blocks}, but num_layers = {num_layers}", hint)
    return kinds


def expand_types(pattern: Sequence[Any] | None, num_layers: int) -> tuple[str, ...] | None:
    """Returns the type of each block, by a pattern as above; None without one."""
    return None if pattern is None else expand_attention(pattern, num_layers, TYPES)


def layer_classes(num_layers: int, kinds: Sequence[str] = ()) -> list[str]:
    """Returns the class name of each layer, which `type:REGEX` matches. kinds: of the blocks; () for attention only."""
    named = {**CLASSES, "amlp": CLASSES["gmlp"]}
    blocks = [named.get(kind, "TransformerBlock") for kind in kinds] or ["TransformerBlock"] * num_layers
    return ["EmbeddingLayer", "Identity", *blocks, "Identity", "FinalNorm", "Head"]


def _expand_item(item: Any, pattern: Sequence[Any], num_layers: int, key: str) -> tuple[str, ...]:
    form = "write [[[kind, ...], count], ...] or [[[kind, ...], all]]"
    if not isinstance(item, (list, tuple)) or len(item) != 2 or not isinstance(item[0], (list, tuple)) or not item[0]:
        raise _error(key, pattern, f"{item!r} is not a pair of kinds and a count", form)
    kinds, count = item
    if not all(isinstance(kind, str) for kind in kinds):
        raise _error(key, pattern, f"{kinds!r} is not a list of kinds of attention", form)
    if count == "all":
        if len(pattern) > 1:
            raise _error(key, pattern, "`all` is not the only item", "give each item a count")
        if num_layers % len(kinds):
            raise _error(
                key,
                pattern,
                f"the pattern has {len(kinds)} kinds, which do not divide num_layers = {num_layers}",
                "give counts instead of `all`",
            )
        count = num_layers // len(kinds)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise _error(key, pattern, f"{count!r} is not a count", form)
    return tuple(kinds) * min(count, 100_000)


def _error(key: str, pattern: Sequence[Any], what: str, hint: str) -> ConfigError:
    return ConfigError.of(what, key=key, value=list(pattern), hint=hint)
