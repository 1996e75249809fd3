"""The weight files: the public layout, written from any layout of ours and read into any other.

A parameter's key is "<layer>.<name>", as in the table of tensors. Without a pipeline all weights of one
tensor-parallel rank stand in mp_rank_XX under names `sequential.<layer>.<name>`; with one every layer has a file of
its own. With a parallel (GPT-J) residual the public layout adds the row-parallel biases of all ranks, so rank 0 writes
the bias and the others write zeros; otherwise every rank writes the same bias.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint import files, layout
from megatron.checkpoint.slices import cut_shard, join_shards
from megatron.errors import Mistake, RunError
from megatron.shapes import TensorShape

_ROW_BIASES = ("attention.dense.bias", "mlp.linear2.bias")
_PREFIX = "sequential."


def key_of(shape: TensorShape) -> str:
    """The key of a tensor of the table."""
    return f"{shape.layer}.{shape.name}"


def write_whole(path: Path, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """One file with all weights of a tensor-parallel rank, for runs without a pipeline."""
    module = {_PREFIX + key: _storable(tensor) for key, tensor in weights.items()}
    files.write_tensors(path, {"module": module, **facts})


def write_layers(directory: Path, weights: dict[str, Tensor], model_rank: int) -> None:
    """One file a layer, for pipelined runs; a stage writes the layers it holds."""
    by_layer: dict[int, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        layer, name = key.split(".", 1)
        by_layer.setdefault(int(layer), {})[name] = _storable(tensor)
    for index, content in by_layer.items():
        files.write_tensors(directory / layout.layer_file(index, model_rank), content)


def public_biases(weights: dict[str, Tensor], *, summed: bool, model_rank: int) -> dict[str, Tensor]:
    """The weights with their row-parallel biases as the public layout has them on this tensor-parallel rank."""
    if not summed or model_rank == 0:
        return weights
    return {key: torch.zeros_like(value) if key.endswith(_ROW_BIASES) else value for key, value in weights.items()}


@dataclass
class WeightFiles:
    """The weights of a checkpoint, read on demand.

    whole: tensor-parallel rank -> file, without a pipeline. layers: (layer, rank) -> file, with one.
    """

    directory: Path
    whole: dict[int, Path]
    layers: dict[tuple[int, int], Path]
    _open: dict[Path, Any] = field(default_factory=dict)

    @staticmethod
    def open(directory: Path) -> WeightFiles:
        """Finds the weight files. RunError if there are none."""
        layers = layout.layer_files(directory)
        whole = {} if layers else layout.model_files(directory)
        if not layers and not whole:
            raise RunError.of("no weight files", where=str(directory), remedy="load another checkpoint")
        return WeightFiles(directory, whole, layers)

    @property
    def model_size(self) -> int:
        """The tensor-parallel degree of the run that wrote the weights."""
        return 1 + max(rank for _, rank in self.layers) if self.layers else len(self.whole)

    def keys(self) -> set[str]:
        """The keys of all stored weights."""
        if self.layers:
            return {f"{layer}.{name}" for layer, rank in self.layers if rank == 0 for name in self._layer(layer, 0)}
        return {name.removeprefix(_PREFIX) for name in self._module(0)}

    def shards(self, key: str) -> list[Tensor]:
        """The tensor as every tensor-parallel rank wrote it, in rank order."""
        layer, name = key.split(".", 1)
        if self.layers:
            return [self._layer(int(layer), rank)[name] for rank in range(self.model_size)]
        return [self._module(rank)[_PREFIX + key] for rank in range(self.model_size)]

    def _layer(self, layer: int, rank: int) -> dict[str, Tensor]:
        path = self.layers.get((layer, rank))
        if path is None:
            missing = str(self.directory / layout.layer_file(layer, rank))
            raise RunError.of("the file is missing", where=missing, remedy="load another iteration")
        content: dict[str, Tensor] = self._load(path)
        return content

    def _module(self, rank: int) -> dict[str, Tensor]:
        if rank not in self.whole:
            missing = str(self.directory / layout.model_file(rank))
            raise RunError.of("the file is missing", where=missing, remedy="load another iteration")
        content: dict[str, Tensor] = self._load(self.whole[rank])["module"]
        return content

    def _load(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = files.read_tensors(path)
        return self._open[path]


def read_shards(
    stored: WeightFiles, wanted: Iterable[TensorShape], *, summed: bool, model_rank: int, model_size: int
) -> dict[str, Tensor]:
    """The shards of the wanted tensors for one tensor-parallel rank, whatever the layout they were stored in.

    summed: row-parallel biases are stored as parts of a sum. Raises RunError naming every tensor that is missing or
    has another shape.
    """
    keys = stored.keys()
    result: dict[str, Tensor] = {}
    faults: list[Mistake] = []
    for shape in wanted:
        key = key_of(shape)
        if key not in keys:
            faults.append(
                Mistake(f"the model has a tensor {key} that the checkpoint lacks", where=str(stored.directory))
            )
            continue
        shards = stored.shards(key)
        expected = shape.local_shape(stored.model_size) if _divides(shape, stored.model_size) else None
        found = tuple(shards[0].shape)
        if found != expected:
            whole = (
                f"{list(shape.shape)} cut {stored.model_size} ways" if stored.model_size > 1 else f"{list(shape.shape)}"
            )
            faults.append(
                Mistake(f"tensor {key} has shape {list(found)}, the model's is {whole}", where=str(stored.directory))
            )
            continue
        if summed and key.endswith(_ROW_BIASES):
            result[key] = torch.stack([shard.float() for shard in shards]).sum(0).to(shards[0].dtype)
        else:
            result[key] = cut_shard(shape, join_shards(shape, shards), model_rank, model_size)
    if faults:
        remedy = "give the configuration the shape of the checkpoint, or load another one"
        faults[-1] = Mistake(faults[-1].what, where=faults[-1].where, remedy=remedy)
        raise RunError(*faults)
    return result


def _divides(shape: TensorShape, size: int) -> bool:
    if shape.shard_dim is None:
        return True
    return all(section % size == 0 for section in shape.sections or (shape.shape[shape.shard_dim],))


def _storable(tensor: Tensor) -> Tensor:
    """A copy on the CPU that owns just its own storage (torch.save stores the whole storage of a view)."""
    return tensor.detach().cpu().clone()
