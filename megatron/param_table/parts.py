"""Tensors of the components of blocks."""

from __future__ import annotations

from collections.abc import Iterable

from megatron.param_table.dims import ModelDims
from megatron.param_table.tensor import TensorShape
from megatron.registry import NORMS, TensorSpec

FIRST_BLOCK = 2
"""Layer index of block 0."""

SHARED = "attention.rpe."
"""Prefix of the tensors of positions that are added to scores: all blocks share those of block 0."""


def key_in_table(layer: int, name: str) -> str:
    """Returns the table's key "<layer>.<name>" of a parameter of a layer."""
    return f"{FIRST_BLOCK if name.startswith(SHARED) else layer}.{name}"


def norm(
    dims: ModelDims, layer: int, name: str, size: int | None = None, shard_dim: int | None = None
) -> list[TensorShape]:
    """Returns the tensors of a norm.

    Args:
        dims: of the model.
        layer: layer index.
        name: of the norm in its layer.
        size: features; the hidden size by default.
        shard_dim: 0 where tensor parallelism shards the features.
    """
    size = size or dims.hidden_size
    entry = NORMS.entry(dims.norm)
    parts = {part: size for part in entry.tensors if dims.norm_bias or part not in entry.optional}
    parts |= dict.fromkeys(entry.scalars, 1)
    return [TensorShape(layer, f"{name}.{part}", (length,), shard_dim, "norm") for part, length in parts.items()]


def positions(dims: ModelDims, layer: int, prefix: str, specs: Iterable[TensorSpec]) -> list[TensorShape]:
    """Returns the tensors of a position scheme.

    Args:
        dims: of the model.
        layer: layer index.
        prefix: of the names.
        specs: tensors of the scheme.
    """
    table = []
    for spec in specs:
        shape = tuple(size if isinstance(size, int) else int(getattr(dims, size)) for size in spec.shape)
        table.append(TensorShape(layer, f"{prefix}{spec.name}", shape, spec.shard_dim, "position_embedding"))
    return table


def column(layer: int, name: str, out: int, inp: int, bias: bool, sections: tuple[int, ...] = ()) -> list[TensorShape]:
    """Returns the tensors of a column-parallel linear layer.

    Args:
        layer: layer index.
        name: of the layer.
        out: output features.
        inp: input features.
        bias: whether it has a bias.
        sections: outputs that are sharded separately.
    """
    table = [TensorShape(layer, f"{name}.weight", (out, inp), 0, "weight", sections)]
    if bias:
        table.append(TensorShape(layer, f"{name}.bias", (out,), 0, "bias", sections))
    return table


def row(layer: int, name: str, out: int, inp: int, bias: bool) -> list[TensorShape]:
    """Returns the tensors of a row-parallel linear layer, whose bias is added after the all-reduce.

    Args:
        layer: layer index.
        name: of the layer.
        out: output features.
        inp: input features.
        bias: whether it has a bias.
    """
    table = [TensorShape(layer, f"{name}.weight", (out, inp), 1, "weight")]
    if bias:
        table.append(TensorShape(layer, f"{name}.bias", (out,), None, "bias"))
    return table


def masked_head(dims: ModelDims, padded_vocab_size: int) -> list[TensorShape]:
    """Returns the tensors of the heads of a masked language model; its matrix is the word embedding's.

    Args:
        dims: of the model.
        padded_vocab_size: rows of the embedding [tokens].
    """
    layer, hidden = dims.num_layers + 4, dims.hidden_size
    table = [TensorShape(layer, "bias", (padded_vocab_size,), 0, "vocabulary_bias")]
    table += replicated(layer, "lm_head.dense", hidden, hidden)
    table += norm(dims, layer, "lm_head.layernorm")
    if dims.binary_head:
        table += replicated(layer, "pooler", hidden, hidden)
        table += replicated(layer, "binary_head", 2, hidden)
    return table


def class_head(dims: ModelDims) -> list[TensorShape]:
    """Returns the tensors of the head of a classifier. dims: of the model."""
    layer, hidden = dims.num_layers + 4, dims.hidden_size
    return replicated(layer, "pooler", hidden, hidden) + replicated(layer, "classifier", dims.classes, hidden)


def replicated(layer: int, name: str, out: int, inp: int, bias: bool = True) -> list[TensorShape]:
    """Returns the tensors of a linear layer that every rank holds in full.

    Args:
        layer: layer index.
        name: of the layer.
        out: output features.
        inp: input features.
        bias: whether it has a bias.
    """
    table = [TensorShape(layer, f"{name}.weight", (out, inp), None, "weight")]
    return [*table, TensorShape(layer, f"{name}.bias", (out,), None, "bias")] if bias else table
