"""Every tensor of a model, written down once.

The order and the names are the public GPT-NeoX checkpoint layout and must not move: layer 0 is the embedding, layers
1 and L+2 hold no parameters, block i is layer i+2, the final norm is layer L+3 and the output layer L+4 (a tied output
layer owns no tensor). Linear weights are [out, in].

How tensor parallelism cuts a tensor: along ``shard_dim``. A tensor with ``sections`` is a stack of parts along that
dimension, and each rank holds its slice of every part, in order. So a rank of a grouped-query model holds
[its q rows | its k rows | its v rows], and a rank of a gated MLP [its up rows | its gate rows]. With as many key/value
heads as query heads the QKV rows are interleaved head by head, [q, k, v] for each, and one plain slice is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from megatron.shapes.dims import ModelDims

Kind = Literal["word_embedding", "position_embedding", "norm", "weight", "bias", "head"]


@dataclass(frozen=True)
class TensorShape:
    """One tensor: where it lives, what it is called, how large it is and how it is cut."""

    layer: int  # index in the layer plan, and in the checkpoint's file names
    name: str  # inside its layer, such as "attention.dense.weight"
    shape: tuple[int, ...]  # global shape
    shard_dim: int | None  # dimension cut by tensor parallelism; None: every rank holds all of it
    kind: Kind
    sections: tuple[int, ...] = ()  # sizes along shard_dim that are cut one by one; (): one section

    @property
    def count(self) -> int:
        """Number of elements of the global tensor."""
        return prod(self.shape)

    def local_shape(self, size: int) -> tuple[int, ...]:
        """The shape one rank of ``size`` tensor-parallel ranks holds. ValueError where the cut is uneven."""
        if self.shard_dim is None:
            return self.shape
        rows = sum(stop - start for start, stop in self.slices(0, size))
        return (*self.shape[: self.shard_dim], rows, *self.shape[self.shard_dim + 1 :])

    def slices(self, rank: int, size: int) -> tuple[tuple[int, int], ...]:
        """(start, stop) ranges along ``shard_dim`` of the global tensor that ``rank`` holds, in its order."""
        if self.shard_dim is None:
            raise ValueError(f"{self.name} is not cut by tensor parallelism")
        return section_slices(self.sections or (self.shape[self.shard_dim],), rank, size)


def section_slices(sections: tuple[int, ...], rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of rank ``rank``'s slice of each section, where the sections lie one after another."""
    ranges = []
    offset = 0
    for section in sections:
        if section % size:
            raise ValueError(f"a section of {section} rows does not divide by {size} tensor-parallel ranks")
        part = section // size
        ranges.append((offset + rank * part, offset + (rank + 1) * part))
        offset += section
    return tuple(ranges)


def tensors(dims: ModelDims, padded_vocab_size: int) -> list[TensorShape]:
    """Every tensor of the model in layer order; a tied head has none of its own. padded_vocab_size [tokens]."""
    table = [TensorShape(0, "word_embeddings.weight", (padded_vocab_size, dims.hidden_size), 0, "word_embedding")]
    if dims.pos_emb == "learned":
        shape = (dims.max_position_embeddings, dims.hidden_size)
        table.append(TensorShape(0, "position_embeddings.weight", shape, None, "position_embedding"))
    for block in range(dims.num_layers):
        table += block_tensors(dims, block + 2)
    table += _norm(dims, dims.num_layers + 3, "norm")
    if not dims.tied:
        shape = (padded_vocab_size, dims.hidden_size)
        table.append(TensorShape(dims.num_layers + 4, "final_linear.weight", shape, 0, "head"))
    return table


def block_tensors(dims: ModelDims, layer: int) -> list[TensorShape]:
    """The tensors of one transformer block that stands at ``layer`` of the plan."""
    hidden, query, kv, width = dims.hidden_size, dims.query_size, dims.kv_size, dims.mlp_width
    qkv_sections = (query, kv, kv) if dims.grouped else ()
    linear1_sections = (width, width) if dims.gated else ()
    linear1 = 2 * width if dims.gated else width
    table = _norm(dims, layer, "input_layernorm")
    table += _column(layer, "attention.query_key_value", query + 2 * kv, hidden, dims.attention_bias, qkv_sections)
    table += _row(layer, "attention.dense", hidden, query, dims.attention_bias)
    if not dims.shared_norm:
        table += _norm(dims, layer, "post_attention_layernorm")
    table += _column(layer, "mlp.linear1", linear1, hidden, dims.mlp_bias, linear1_sections)
    table += _row(layer, "mlp.linear2", hidden, width, dims.mlp_bias)
    return table


def _norm(dims: ModelDims, layer: int, name: str) -> list[TensorShape]:
    if dims.norm == "rmsnorm":
        return [TensorShape(layer, f"{name}.scale", (dims.hidden_size,), None, "norm")]
    table = [TensorShape(layer, f"{name}.weight", (dims.hidden_size,), None, "norm")]
    if dims.norm_bias:
        table.append(TensorShape(layer, f"{name}.bias", (dims.hidden_size,), None, "norm"))
    return table


def _column(layer: int, name: str, out: int, inp: int, bias: bool, sections: tuple[int, ...]) -> list[TensorShape]:
    table = [TensorShape(layer, f"{name}.weight", (out, inp), 0, "weight", sections)]
    if bias:
        table.append(TensorShape(layer, f"{name}.bias", (out,), 0, "bias", sections))
    return table


def _row(layer: int, name: str, out: int, inp: int, bias: bool) -> list[TensorShape]:
    table = [TensorShape(layer, f"{name}.weight", (out, inp), 1, "weight")]
    if bias:
        table.append(TensorShape(layer, f"{name}.bias", (out,), None, "bias"))
    return table
