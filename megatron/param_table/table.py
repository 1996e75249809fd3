"""Table of every tensor of a model.

Order and names are those of the public GPT-NeoX checkpoint layout and must not change: layer 0 is the embedding, layers
1 and L+2 have no parameters, block i is layer i+2, the final norm is layer L+3 and the output layer L+4 (a tied output
layer has no tensor). Modules that predict further tokens are the layers from L+5 on, and so are the layers of a second
encoder, in the same order as those of the first. Linear weights are [out, in].

Tensor parallelism shards a tensor along ``shard_dim``. A tensor with ``sections`` is a stack of sections along that
dimension, and each rank has its slice of every section, in order. So a rank of a grouped-query model has
[its q rows | its k rows | its v rows], and a rank of a gated MLP [its up rows | its gate rows]. With as many key/value
heads as query heads the QKV rows are interleaved head by head, [q, k, v] for each, and one slice suffices.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.param_table.adapters import prompt_tensor, with_trained
from megatron.param_table.blocks import block_tensors, further_token
from megatron.param_table.dims import ModelDims
from megatron.param_table.parts import class_head, masked_head, norm, positions, replicated
from megatron.param_table.tensor import TensorShape
from megatron.registry import POSITIONS


def tensors(dims: ModelDims, padded_vocab_size: int) -> list[TensorShape]:
    """Returns every tensor of the model in layer order; a tied head has none. padded_vocab_size: [tokens]."""
    table = [TensorShape(0, "word_embeddings.weight", (padded_vocab_size, dims.hidden_size), 0, "word_embedding")]
    table += positions(dims, 0, "position_embeddings.", POSITIONS.entry(dims.pos_emb).embedding)
    if dims.token_types:
        shape = (dims.token_types, dims.hidden_size)
        table.append(TensorShape(0, "tokentype_embeddings.weight", shape, None, "position_embedding"))
    if dims.embedding_norm:
        table += norm(dims, 0, "embedding_norm")
    if dims.prompt:
        table.append(prompt_tensor(dims.prompt, dims.hidden_size))
    for block in range(dims.num_layers):
        table += block_tensors(dims, block)
    table += [] if dims.norms_sums else norm(dims, dims.num_layers + 3, "norm")
    if dims.masked_head:
        table += masked_head(dims, padded_vocab_size)
    if dims.projection:
        table += replicated(dims.num_layers + 4, "projection", dims.projection, dims.hidden_size)
    if dims.towers > 1:
        table += [replace(shape, layer=shape.layer + dims.tower_layers) for shape in table]
    if dims.classes:
        table += class_head(dims)
    elif not dims.tied and not dims.towers:
        shape = (padded_vocab_size, dims.hidden_size)
        table.append(TensorShape(dims.num_layers + 4, "final_linear.weight", shape, 0, "head"))
    for depth in range(dims.mtp_layers):
        table += further_token(dims, dims.num_layers + 5 + depth)
    return with_trained(table, dims.low_rank, tied=dims.tied)
