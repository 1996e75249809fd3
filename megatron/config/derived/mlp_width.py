"""Derived widths of a block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def round_up(size: int, multiple: int) -> int:
    """Returns the least multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def mlp_base_width(hidden_size: int, intermediate_size: int | None, expansion_factor: float | None) -> int:
    """Returns intermediate_size, or expansion_factor x hidden_size, or 4 x hidden_size."""
    if intermediate_size is not None:
        return intermediate_size
    if expansion_factor is not None:
        return int(expansion_factor * hidden_size)
    return 4 * hidden_size


def mlp_width(
    hidden_size: int, intermediate_size: int | None, expansion_factor: float | None, multiple_of: int, *, gated: bool
) -> int:
    """Returns the inner width of the MLP [features]: the inputs of its second matrix.

    A gated MLP has three matrices, a plain one two. With an inner width of 2/3 of the plain one the parameter counts
    agree (arXiv:2002.05202 section 3); public configurations give the base width so that the two input matrices
    together have 2/3 of it, hence the inner width is one third of the base.

    Args:
        hidden_size: of the model.
        intermediate_size: base width; takes precedence over expansion_factor.
        expansion_factor: base width as a multiple of hidden_size.
        multiple_of: the result is rounded up to a multiple of this.
        gated: whether the activation is gated.
    """
    base = mlp_base_width(hidden_size, intermediate_size, expansion_factor)
    if not gated:
        return round_up(base, multiple_of)
    return round_up(base * 2 // 3, 2 * multiple_of) // 2


HEAD_KEYS = (*("hidden_size", "num_attention_heads", "multi_latent_attention", "qk_head_dim", "qk_pos_emb_head_dim"),)
"""Keys that the width of a head follows from."""


def head_dim(values: Mapping[str, Any]) -> int:
    """Returns the width of one query and key head [features].

    Of the hidden size it is rounded down; a rule rejects a remainder. values: of HEAD_KEYS.
    """
    if values["multi_latent_attention"]:
        return int(values["qk_head_dim"] + values["qk_pos_emb_head_dim"])
    return int(values["hidden_size"] // max(1, values["num_attention_heads"]))
