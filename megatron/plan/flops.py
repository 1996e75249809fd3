"""Model FLOPs of one iteration: what training needs, whatever is recomputed.

A matrix product with a weight costs 2 FLOPs for each of its elements and each token forward, and twice that backward.
Attention adds the products of queries with keys and of probabilities with values: 4 s FLOPs a token for each feature
of the query heads, counted over the whole square as is customary, not over the causal half. Source: Narayanan et al.
2021, arXiv:2104.04473, appendix; embedding look-ups, norms and activations are left out there too. Of the experts
those count that a token visits.

s sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.shapes import ModelDims, TensorShape


def flops_per_iteration(
    dims: ModelDims, table: Sequence[TensorShape], *, seq_length: int, train_batch_size: int
) -> int:
    """FLOPs of forward and backward over the global batch [FLOP]."""
    matrices = sum(tensor.count for tensor in table if tensor.kind in {"weight", "head"})
    matrices += (
        sum(tensor.count for tensor in table if tensor.kind == "expert") * dims.mixture.top_k // dims.mixture.experts
    )
    if dims.tied:
        matrices += sum(tensor.count for tensor in table if tensor.kind == "word_embedding")
    attention = 4 * seq_length * dims.query_size * dims.num_layers
    return 3 * (2 * matrices + attention) * seq_length * train_batch_size
