"""Writes weights in the public layout at any degree of parallelism, a tensor at a time, without an engine.

For checkpoints that come from another program, and for those that other programs want in another layout.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.format import files, layout, weight_shards
from megatron.checkpoint.format.files import Written
from megatron.checkpoint.format.optimizer_shards import take_shard
from megatron.param_table import TensorShape

ReadTensor = Callable[[TensorShape], Tensor]
_IN_MEMORY = 1 << 30  # bytes; tensors beyond it wait in files until they are written


def write_weights(
    directory: Path,
    table: Sequence[TensorShape],
    read_tensor: ReadTensor,
    *,
    model_size: int,
    pipe_size: int,
    summed: bool,
    facts: Mapping[str, Any],
) -> list[Written]:
    """The weight files of a run with those parallel sizes; pipe_size 0 is one file a tensor-parallel rank.

    whole: gives the global tensor; called once a rank at most.

    Args:
        directory: The folder to write.
        table: The tensors to write.
        read_tensor: Reads one full tensor.
        model_size: Tensor-parallel degree of the files.
        pipe_size: Pipeline-parallel degree; 0 writes one file for each rank.
        summed: row-parallel biases are parts of a sum.
        facts: What the model files say beside the weights. Holds about one layer at a time, and 1 GiB.
    """
    written = []
    for rank in range(model_size):
        if pipe_size:
            for layer, shapes in groupby(table, key=lambda shape: shape.layer):
                held = _shards(shapes, read_tensor, rank, model_size, summed)
                content = {name.split(".", 1)[1]: tensor.contiguous() for name, tensor in held}
                written.append(files.write_tensors(directory / layout.layer_file(layer, rank), _owned(content)))
        else:
            with tempfile.TemporaryDirectory(dir=directory, prefix="scratch-") as scratch:
                shards = _shards(table, read_tensor, rank, model_size, summed)
                path = directory / layout.model_file(rank)
                written.append(weight_shards.write_model_file(path, _held(shards, Path(scratch)), dict(facts)))
    if pipe_size:
        for rank in range(model_size * pipe_size):
            path = directory / layout.model_file(rank)
            written.append(files.write_tensors(path, {"module": None, **facts}))
    return written


def _shards(
    shapes: Iterable[TensorShape], read_tensor: ReadTensor, rank: int, size: int, summed: bool
) -> Iterator[tuple[str, Tensor]]:
    """(key, this rank's part) of every tensor, as the public layout has it."""
    for shape in shapes:
        part = {weight_shards.key_of(shape): take_shard(shape, read_tensor(shape), rank, size)}
        yield from weight_shards.public_biases(part, summed=summed, model_rank=rank).items()


def _owned(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with a storage of its own: torch.save stores the whole storage of a view."""
    return {name: _with_own_storage(tensor) for name, tensor in content.items()}


def _with_own_storage(tensor: Tensor) -> Tensor:
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _held(shards: Iterable[tuple[str, Tensor]], scratch: Path) -> dict[str, Tensor]:
    """The tensors by key: the first ones as they are, in order in memory, those beyond _IN_MEMORY in files."""
    held = {}
    size = 0
    for key, tensor in shards:
        size += tensor.nbytes
        held[key] = _with_own_storage(tensor.contiguous()) if size <= _IN_MEMORY else _on_disk(tensor, scratch, key)
    return held


def _on_disk(tensor: Tensor, folder: Path, name: str) -> Tensor:
    """The same values in a file instead of in memory."""
    storage = torch.UntypedStorage.from_file(str(folder / name), shared=True, nbytes=tensor.nbytes)
    flat = torch.empty(0, dtype=tensor.dtype).set_(storage)  # type: ignore[arg-type]
    return flat.view(tensor.shape).copy_(tensor)
