"""Reads the weights of a checkpoint for one tensor-parallel rank, whatever tensor-parallel degree wrote them.

The stored shards of a tensor are joined to the global tensor, padded to the reader's vocabulary, and the reader's shard
is taken from it. Row-parallel biases that were stored as terms of a sum are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron.checkpoint.format.optimizer_shards import VOCABULARY, join_shards, pad_rows, take_shard
from megatron.checkpoint.format.weight_shards import ROW_BIASES, StoredWeights, key_of
from megatron.errors import ConfigIssue, RunError
from megatron.param_table import TensorShape


def read_shards(
    stored: StoredWeights, requested: Iterable[TensorShape], *, summed: bool, model_rank: int, model_size: int
) -> dict[str, Tensor]:
    """Reads the shards of the requested tensors for one tensor-parallel rank.

    Raises RunError naming every tensor that is missing or has another shape.

    Args:
        stored: The weight files of a checkpoint.
        requested: The tensors to read.
        summed: row-parallel biases are stored as parts of a sum.
        model_rank: Tensor-parallel rank of the reader.
        model_size: Tensor-parallel degree of the reader.
    """
    keys = stored.keys()
    result: dict[str, Tensor] = {}
    errors: list[ConfigIssue] = []
    location = str(stored.directory)
    for shape in requested:
        key = key_of(shape)
        if key not in keys:
            errors.append(ConfigIssue(f"the model has a tensor {key} that the checkpoint lacks", location=location))
            continue
        shards = stored.shards(key)
        written = as_stored(shape, shards, stored.model_size)
        error = _misfit(written, shards, stored.model_size)
        if error is None:
            full = pad_rows(shape, assemble(written, shards, summed=summed))
            result[key] = take_shard(shape, full, model_rank, model_size)
        else:
            errors.append(ConfigIssue(error, location=location))
    if errors:
        hint = "give the configuration the shape of the checkpoint, or load another one"
        errors[-1] = ConfigIssue(errors[-1].message, location=errors[-1].location, hint=hint)
        raise RunError(*errors)
    return result


def assemble(shape: TensorShape, shards: Sequence[Tensor], *, summed: bool) -> Tensor:
    """The global tensor from what all tensor-parallel ranks stored."""
    if summed and shape.name.endswith(ROW_BIASES) and len(shards) > 1:
        return torch.stack([shard.float() for shard in shards]).sum(0).to(shards[0].dtype)
    return join_shards(shape, shards)


def as_stored(shape: TensorShape, shards: Sequence[Tensor], size: int) -> TensorShape:
    """The tensor as it was written: its vocabulary may have been padded less than the reader's."""
    if shape.kind not in VOCABULARY or shards[0].dim() != len(shape.shape):
        return shape
    rows = shards[0].shape[0] * size
    return replace(shape, shape=(rows, *shape.shape[1:])) if rows < shape.shape[0] else shape


def _misfit(shape: TensorShape, shards: Sequence[Tensor], size: int) -> str | None:
    """What is wrong with the shape of stored shards, if anything."""
    expected = shape.local_shape(size) if _divides(shape, size) else None
    other = next((shard for shard in shards if tuple(shard.shape) != expected), None)
    if other is None:
        return None
    found = f"tensor {key_of(shape)} has shape {list(other.shape)}"
    if size == 1:
        return f"{found}, the model's is {list(shape.shape)}"
    own = f"{list(shape.shape)}, which {size} do not divide" if expected is None else f"{list(expected)} there"
    return f"{found} in each of {size} shards, the model's is {own}"


def _divides(shape: TensorShape, size: int) -> bool:
    if shape.shard_dim is None:
        return True
    return all(section % size == 0 for section in shape.sections or (shape.shape[shape.shard_dim],))
