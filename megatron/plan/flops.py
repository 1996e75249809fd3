"""Model FLOPs of one iteration: what training needs, whatever is recomputed.

A matrix product with a weight costs 2 FLOPs for each of its elements and each token forward, and twice that backward.
Attention adds the products of queries with keys and of probabilities with values: 4 s FLOPs a token for each feature
of the query heads, counted over the whole square as is customary, not over the causal half. Of a sliding window or a
sparse layout the visible share of the causal half is taken, and of the experts those count that a token visits. Source:
Narayanan et al. 2021, arXiv:2104.04473, appendix; embedding look-ups, norms and activations are left out there too.

s sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.shapes import ModelDims, TensorShape


def flops_per_iteration(
    dims: ModelDims,
    table: Sequence[TensorShape],
    *,
    seq_length: int,
    train_batch_size: int,
    shares: Sequence[float] | None = None,
) -> int:
    """FLOPs of forward and backward over the global batch [FLOP].

    shares: of the earlier positions, what each block's attention sees [fraction]; all unless given.
    """
    matrices = sum(tensor.count for tensor in table if tensor.kind in {"weight", "head"})
    matrices += (
        sum(tensor.count for tensor in table if tensor.kind == "expert") * dims.mixture.top_k // dims.mixture.experts
    )
    if dims.tied:
        matrices += sum(tensor.count for tensor in table if tensor.kind == "word_embedding")
    seen = dims.num_layers if shares is None else sum(shares)
    attention = round(4 * seq_length * dims.query_size * seen)
    return 3 * (2 * matrices + attention) * seq_length * train_batch_size
