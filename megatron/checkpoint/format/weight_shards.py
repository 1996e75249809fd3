"""The weight files: the public layout, written from any layout of ours and read into any other.

A parameter's key is "<layer>.<name>", as in the table of tensors. Without a pipeline all weights of one
tensor-parallel rank are in mp_rank_XX under names `sequential.<layer>.<name>`; with one every layer has a file of
its own. With a parallel (GPT-J) residual the public layout adds the row-parallel biases of all ranks, so rank 0 writes
the bias and the others write zeros; otherwise every rank writes the same bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.checkpoint.format import files, layout
from megatron.checkpoint.format.files import Written
from megatron.errors import RunError
from megatron.param_table import TensorShape, key_in_table

ROW_BIASES = ("attention.dense.bias", "mlp.linear2.bias")
_PREFIX = "sequential."
_OLD_NAMES = {"mlp.dense_h_to_4h.": "mlp.linear1.", "mlp.dense_4h_to_h.": "mlp.linear2."}
_TABLES = ("attention.rotary_emb.inv_freq", "attention.masked_bias", "attention.bias")


def key_of(shape: TensorShape) -> str:
    """The key of a tensor of the table."""
    return shape.key


def model_file_content(weights: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Any]:
    """What one file holds with all weights of a tensor-parallel rank, for runs without a pipeline; copies."""
    return {"module": {_PREFIX + key: _storable(tensor) for key, tensor in weights.items()}, **facts}


def by_layer(weights: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Layer -> its weights under the names that its file has, for pipelined runs; not copied."""
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        layer, name = key.split(".", 1)
        layers.setdefault(int(layer), {})[name] = tensor
    return layers


def layer_content(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the file of one layer holds; copies."""
    return {name: _storable(tensor) for name, tensor in weights.items()}


def write_model_file(path: Path, weights: dict[str, Tensor], facts: dict[str, Any]) -> Written:
    """One file with all weights of a tensor-parallel rank, which own their storages and are on the CPU."""
    return files.write_tensors(path, {"module": {_PREFIX + key: held for key, held in weights.items()}, **facts})


def public_biases(weights: dict[str, Tensor], *, summed: bool, model_rank: int) -> dict[str, Tensor]:
    """The weights with their row-parallel biases as the public layout has them on this tensor-parallel rank."""
    if not summed or model_rank == 0:
        return weights
    return {key: torch.zeros_like(value) if key.endswith(ROW_BIASES) else value for key, value in weights.items()}


class StoredWeights(Protocol):
    """Weights somewhere on the disk, read on demand. model_size: tensor-parallel degree they were written at."""

    @property
    def directory(self) -> Path: ...

    @property
    def model_size(self) -> int: ...

    def keys(self) -> set[str]:
        """The keys of all stored weights."""

    def shards(self, key: str) -> list[Tensor]:
        """The tensor as every tensor-parallel rank wrote it, in rank order."""


@dataclass
class WeightFiles:
    """The weights of a checkpoint, read on demand.

    whole: tensor-parallel rank -> file, without a pipeline.
    """

    directory: Path
    """The checkpoint's folder."""
    model_files: dict[int, Path]
    """Tensor-parallel rank to file, without a pipeline."""
    layers: dict[tuple[int, int], Path]
    """(layer, rank) -> file, with one."""
    _open: dict[Path, Any] = field(default_factory=dict)

    @staticmethod
    def open(directory: Path) -> WeightFiles:
        """Finds the weight files. RunError if there are none."""
        layers = layout.layer_files(directory)
        model_files = {} if layers else layout.model_files(directory)
        if not layers and not model_files:
            raise RunError.of("no weight files", location=str(directory), hint="load another checkpoint")
        return WeightFiles(directory, model_files, layers)

    @property
    def model_size(self) -> int:
        """The tensor-parallel degree of the run that wrote the weights."""
        return 1 + max(rank for _, rank in self.layers) if self.layers else len(self.model_files)

    def keys(self) -> set[str]:
        """The keys of all stored weights."""
        if self.layers:
            names = [(layer, name) for layer, rank in self.layers if rank == 0 for name in self._layer(layer, 0)]
        else:
            split = (key.split(".", 1) for key in self._module(0))
            names = [(int(layer), name) for layer, name in split]
        return {key_in_table(layer, name) for layer, name in names}  # public files hold what blocks share in each

    def shards(self, key: str) -> list[Tensor]:
        """The tensor as every tensor-parallel rank wrote it, in rank order. RunError if a rank's is not there."""
        layer, name = key.split(".", 1)
        found = []
        for rank in range(self.model_size):
            held, label = (self._layer(int(layer), rank), name) if self.layers else (self._module(rank), key)
            if label not in held:
                raise RunError.of(f"rank {rank} has no tensor {key}", location=str(self.directory))
            found.append(held[label])
        return found

    def close(self) -> None:
        """Lets go of the files that were read."""
        self._open.clear()

    def _layer(self, layer: int, rank: int) -> dict[str, Tensor]:
        path = self.layers.get((layer, rank))
        if path is None:
            missing = str(self.directory / layout.layer_file(layer, rank))
            raise RunError.of("the file is missing", location=missing, hint="load another iteration")
        return self._read(path, modern_names)

    def _module(self, rank: int) -> dict[str, Tensor]:
        if rank not in self.model_files:
            missing = str(self.directory / layout.model_file(rank))
            raise RunError.of("the file is missing", location=missing, hint="load another iteration")
        return self._read(self.model_files[rank], _module_of)

    def _read(self, path: Path, arrange: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        if path not in self._open:
            content = files.read_tensors(path)
            if not isinstance(content, dict):
                raise RunError.of(
                    "the file holds no weights by name", location=str(path), hint="load another checkpoint"
                )
            self._open[path] = arrange(content)
        return self._open[path]


def _module_of(content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a file of a run without a pipeline, by key."""
    module = content.get("module") or {}
    return modern_names({name.removeprefix(_PREFIX): tensor for name, tensor in module.items()})


def modern_names(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under today's names: older checkpoints have other names for the MLP, and tables beside the weights."""
    found: dict[str, Tensor] = {}
    for name, tensor in content.items():
        if name.endswith(_TABLES):
            continue
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        found[name] = tensor
    for name in [name for name in found if name.endswith("mlp.w1.weight")]:
        stem = name.removesuffix("w1.weight")
        # The plain half first, then the one that the activation sees; a rank has its part of both.
        found[f"{stem}linear1.weight"] = torch.cat((found.pop(f"{stem}w3.weight"), found.pop(name)))
        found[f"{stem}linear2.weight"] = found.pop(f"{stem}w2.weight")
    return found


def _storable(tensor: Tensor) -> Tensor:
    """A copy on the CPU that owns just its own storage (torch.save stores the whole storage of a view)."""
    return tensor.detach().to("cpu", copy=True)
