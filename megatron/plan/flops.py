"""Model FLOPs of one iteration, without recomputation.

A matrix product with a weight costs 2 FLOPs for each of its elements and each token forward, and twice that backward:
for the gradient of the input and for that of the weight, which a frozen one does not need.
Attention adds the products of queries with keys and of probabilities with values: 2 s FLOPs per token and feature of
the query heads and of the value heads each, counted over the full square as is customary, not over the causal half. A
sliding window or a sparse layout counts the visible fraction of the causal half, and of the experts those of the token.
A masked language model needs logits of the tokens that it predicts alone, and its pooler reads one token of a sample.
Mamba, RWKV and gated delta nets update and read a state, a gMLP multiplies with a matrix of positions, also counted in
full. Source: Narayanan et al. 2021, arXiv:2104.04473, appendix; embedding look-ups, norms and activations are left out
there too. A module that predicts further tokens has a block as the last one, and the output layer once more.

s sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.param_table import ModelDims, TensorShape
from megatron.registry import GATED_DELTA_NET, MLP_ALONE, WITHOUT_ATTENTION


def flops_per_iteration(
    dims: ModelDims,
    table: Sequence[TensorShape],
    *,
    seq_length: int,
    train_batch_size: int,
    shares: Sequence[float] | None = None,
    predicted: float = 1.0,
) -> int:
    """Returns the FLOPs of forward and backward over the global batch.

    Args:
        dims: of the model.
        table: every tensor of the model.
        seq_length: [tokens].
        train_batch_size: [samples].
        shares: visible fraction of each block's attention; 1 by default.
        predicted: fraction of the tokens that a masked language model predicts; 1 for a language model.
    """
    updates = sum(tensor.count for tensor in table if tensor.kind == "adapter" and len(tensor.shape) > 1)
    updates += _of_token(dims, table, "expert_adapter")
    heads = [tensor for tensor in table if tensor.kind == "weight" and tensor.layer == dims.num_layers + 4]
    matrices = sum(tensor.count for tensor in table if tensor.kind == "weight" and tensor not in heads)
    matrices += sum(
        round(tensor.count * predicted) if tensor.name.startswith("lm_head") else tensor.count // seq_length
        for tensor in heads
    )
    matrices += _of_token(dims, table, "expert")
    head = "word_embedding" if dims.tied else "head"
    matrices += round((predicted + dims.mtp_layers) * sum(tensor.count for tensor in table if tensor.kind == head))
    mixing = 0.0
    for block in (*range(dims.num_layers), *[dims.num_layers - 1] * dims.mtp_layers):
        share = 1.0 if shares is None else shares[block]
        mixing += _mixing(dims, block, seq_length) * (1.0 if dims.kind(block) in WITHOUT_ATTENTION else share)
    products = 2 * matrices * (2 if dims.frozen else 3) + 2 * updates * 3
    if dims.frozen and dims.trains_head:
        products += 2 * sum(tensor.count for tensor in table if tensor.kind == head)
    return (products + 3 * round(mixing)) * seq_length * train_batch_size


def _of_token(dims: ModelDims, table: Sequence[TensorShape], kind: str) -> int:
    """Returns the elements of experts' tensors of a kind that a token passes through."""
    return sum(tensor.count for tensor in table if tensor.kind == kind) * dims.mixture.top_k // dims.mixture.experts


def _mixing(dims: ModelDims, block: int, seq_length: int) -> int:
    """Returns the forward FLOPs of a token that are no weight products: of attention or a mixer."""
    kind, mixers = dims.kind(block), dims.mixers
    if kind == "mamba":  # decay, update and read of the state; the convolution
        return mixers.mamba_inner * (6 * mixers.mamba_state + 2 * mixers.mamba_convolution)
    if kind == "mamba2":
        sizes = mixers.mamba2
        return 6 * sizes.inner * sizes.state + 2 * mixers.mamba_convolution * sum(sizes.mixed)
    if kind == GATED_DELTA_NET:  # decay, read by the key, update and read of the state; the convolution
        delta = mixers.delta
        return 8 * delta.value_size * delta.key + 2 * delta.convolution * sum(delta.mixed)
    if kind == "rwkv":  # as for mamba, for a state as wide as a head for each of its features
        return 6 * mixers.rwkv_attention * mixers.rwkv_head
    if kind in {"gmlp", "amlp"}:
        small = 4 * seq_length * mixers.gmlp_attention if kind == "amlp" else 0
        return 2 * seq_length * mixers.gmlp_width + small
    if kind == MLP_ALONE:
        return 0
    return 2 * seq_length * (dims.query_size + dims.value_size)
