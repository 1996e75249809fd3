"""Which blocks of a model with retrieval attend to neighbours."""

from __future__ import annotations

SHALLOW = 15
"""Most blocks of a model whose first retrieving block is the sixth; that of a deeper one is the ninth."""
EVERY = 3
"""Blocks from one that retrieves to the next."""


def usual_blocks(num_layers: int) -> tuple[int, ...]:
    """Returns the blocks with attention to neighbours as Megatron-LM chooses them: every third from the 6th or 9th."""
    first = 6 if num_layers <= SHALLOW else 9
    return tuple(range(first - 1, num_layers, EVERY))
