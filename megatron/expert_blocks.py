"""Which blocks of a model have experts in place of one MLP."""

from __future__ import annotations

from collections.abc import Sequence


def has_experts(block: int, *, interval: int, first_dense: int = 0, listed: Sequence[int] | None = None) -> bool:
    """Returns whether a block of a model with experts has them.

    Args:
        block: number of the block, from 0.
        interval: every so many blocks have experts, counted from the first of the model.
        first_dense: first blocks without experts.
        listed: for each block 1 or 0, in place of both; None or empty without a list.
    """
    if listed:
        return block < len(listed) and bool(listed[block])
    return block >= first_dense and block % max(1, interval) == 0
