"""How context-parallel ranks divide between heads and a ring, and into which parts they cut a sequence.

Shared by the rules of the configuration, the plan and the ranks themselves.
"""

from __future__ import annotations

from math import gcd, lcm

ULYSSES, RING, BOTH = "ulysses", "ring", "both"
METHODS = (ULYSSES, RING, BOTH)
"""How context-parallel ranks attend to the shards of others: by heads, by passing keys and values on, or both."""


def ulysses_size(method: str, context: int, key_heads: int) -> int:
    """Returns how many neighbours among context-parallel ranks exchange shards for heads; the others form rings.

    Args:
        method: one of METHODS.
        context: context-parallel ranks.
        key_heads: key/value heads of a tensor-parallel rank.
    """
    if method == BOTH:
        return gcd(context, key_heads)
    return context if method == ULYSSES else 1


def sequence_multiple(context: int, ulysses: int, tensor: int = 1, *, zigzag: bool = True) -> int:
    """Returns the number that divides the length of every sequence.

    Args:
        context: context-parallel ranks.
        ulysses: those of them that exchange shards for heads.
        tensor: tensor-parallel ranks over which sequences are sharded further; 1 without sequence parallelism.
        zigzag: false where shards follow each other, since blocks process the sequence in order.
    """
    ring = context // ulysses
    return lcm(context * tensor, 2 * ring if ring > 1 and zigzag else 1)
