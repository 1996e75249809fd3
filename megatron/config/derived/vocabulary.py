"""Vocabulary padding, so that every tensor-parallel rank has the same number of rows.

The added rows belong to no token. They are part of the embedding's shape and so of every checkpoint: a model must be
loaded with the divisor it was trained with.
"""

from __future__ import annotations

from megatron.config.derived.mlp_width import round_up


def padded_vocab_size(vocab_size: int, divisible_by: int, model_parallel_size: int) -> int:
    """Returns the least multiple of divisible_by * model_parallel_size that is at least vocab_size [tokens]."""
    return round_up(vocab_size, divisible_by * model_parallel_size)
