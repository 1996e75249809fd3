"""Model FLOPs of one iteration: what training needs, whatever is recomputed.

A matrix product with a weight costs 2 FLOPs for each of its elements and each token forward, and twice that backward:
for the gradient of the input and for that of the weight, which a frozen one does not need.
Attention adds the products of queries with keys and of probabilities with values: 4 s FLOPs a token for each feature
of the query heads, counted over the whole square as is customary, not over the causal half. Of a sliding window or a
sparse layout the visible share of the causal half is taken, and of the experts those count that a token visits. Mamba
and RWKV update and read a state, a gMLP multiplies with a matrix of positions, counted whole as well. Source:
Narayanan et al. 2021, arXiv:2104.04473, appendix; embedding look-ups, norms and activations are left out there too.

s sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.param_table import ModelDims, TensorShape
from megatron.registry import WITHOUT_ATTENTION


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
    updates = sum(tensor.count for tensor in table if tensor.kind == "adapter")
    matrices = sum(tensor.count for tensor in table if tensor.kind in {"weight", "head"})
    matrices += (
        sum(tensor.count for tensor in table if tensor.kind == "expert") * dims.mixture.top_k // dims.mixture.experts
    )
    if dims.tied:
        matrices += sum(tensor.count for tensor in table if tensor.kind == "word_embedding")
    mixing = 0.0
    for block in range(dims.num_layers):
        share = 1.0 if shares is None else shares[block]
        mixing += _mixing(dims, block, seq_length) * (1.0 if dims.kind(block) in WITHOUT_ATTENTION else share)
    products = 2 * matrices * (2 if dims.frozen else 3) + 2 * updates * 3
    return (products + 3 * round(mixing)) * seq_length * train_batch_size


def _mixing(dims: ModelDims, block: int, seq_length: int) -> int:
    """FLOPs of a token forward, between the weight products of a block: attention, or what stands for it."""
    kind, mixers = dims.kind(block), dims.mixers
    if kind == "mamba":  # the state fades, takes in and is read; the convolution
        return mixers.mamba_inner * (6 * mixers.mamba_state + 2 * mixers.mamba_convolution)
    if kind == "rwkv":  # the same, for a state as wide as a head for each of its features
        return 6 * mixers.rwkv_attention * mixers.rwkv_head
    if kind in {"gmlp", "amlp"}:
        small = 4 * seq_length * mixers.gmlp_attention if kind == "amlp" else 0
        return 2 * seq_length * mixers.gmlp_width + small
    return 4 * seq_length * dims.query_size
