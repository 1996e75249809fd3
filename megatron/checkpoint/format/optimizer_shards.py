"""Optimizer state by parameter name, so that any layout can read what any other wrote.

A slice is a range of one tensor-parallel shard, flattened: ZeRO gives each data-parallel rank such ranges, a run
without ZeRO gives data rank 0 the whole shard. Writing stores every rank's slices with an index beside them; reading
puts the shards of one parameter together, then the global tensor, and cuts out what the reader's layout needs. Only
one parameter is held whole at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.format import files, layout
from megatron.errors import RunError
from megatron.param_table import TensorShape

VOCABULARY = ("word_embedding", "head", "vocabulary_bias")
"""Kinds of tensors whose rows are padded to a multiple, so that readers may have more of them than writers."""

MASTER = "master"
"""The fp32 copy of a parameter that is trained in a lower precision."""

EMA = "ema"
"""The exponential moving average of a parameter."""

TRAINED = "train_weights"
"""The weights that training goes on with, where the checkpoint's model has an average of them."""

WEIGHTS = (MASTER, EMA, TRAINED, "x0", "z")
"""State that holds weights: MADGRAD keeps the first ones, schedule-free AdamW its iterate z."""


@dataclass(frozen=True)
class OptimizerShard:
    """The optimizer's values for elements start <= i < stop of one flattened tensor-parallel shard."""

    key: str
    """"<layer>.<name>"."""
    start: int
    """First element of the range."""
    stop: int
    """One past the last element of the range."""
    step: int
    """Number of updates made [steps]."""
    tensors: dict[str, Tensor]
    """one-dimensional, by the optimizer's own names (exp_avg, exp_avg_sq, MASTER)."""
    tensor_level: dict[str, Tensor] = field(default_factory=dict)
    """Values of any shape that belong to the global tensor as a whole."""
    model_rank: int | None = None
    """Whose shard it is, where it is not the writer's."""


def index(slices: Sequence[OptimizerShard], *, model_rank: int, model_size: int) -> dict[str, Any]:
    """What the slices of one global rank are, without their values."""
    entries = []
    for piece in slices:
        entry = {"key": piece.key, "start": piece.start, "stop": piece.stop, "step": piece.step}
        entry |= {"names": sorted(piece.tensors)}
        if piece.tensor_level:
            entry["whole"] = sorted(piece.tensor_level)
        if piece.model_rank is not None:
            entry["model_rank"] = piece.model_rank
        entries.append(entry)
    return {"model_rank": model_rank, "model_size": model_size, "slices": entries}


def values(slices: Sequence[OptimizerShard]) -> list[dict[str, Tensor]]:
    """The values of the slices, in order; copies in the host's memory."""
    return [
        {name: tensor.detach().cpu().clone() for name, tensor in {**piece.tensors, **piece.tensor_level}.items()}
        for piece in slices
    ]


@dataclass(frozen=True)
class SliceLocation:
    """Location of one slice: its file, its position there, and the range it covers."""

    file: Path
    """The file that holds it."""
    position: int
    """Its number in the file."""
    model_rank: int
    """Tensor-parallel rank of the writer."""
    start: int
    """First element of the range."""
    stop: int
    """One past the last element of the range."""
    step: int
    """Updates made [steps]."""
    names: tuple[str, ...]
    """The optimizer's names for the stored values."""
    tensor_level: tuple[str, ...]
    """Names of stored values that belong to the global tensor."""


@dataclass
class OptimizerState:
    """The optimizer state of a checkpoint, read on demand.

    places: parameter key -> its slices.
    """

    model_size: int
    """tensor-parallel degree of the run that wrote them."""
    locations: dict[str, list[SliceLocation]]
    """Locations of the slices of each key."""
    shapes: dict[str, TensorShape]
    """Key -> the reader's tensor."""
    rows: int | None = None
    """Of the writer's embedding, where the reader's may have more."""
    weights: Callable[[str, int, int], Tensor] | None = None
    """(key, model rank, model size) -> flat fp32 weights, where those were stored in fp32 and so are the MASTER that
    was not kept.
    """
    _open: dict[Path, Any] = field(default_factory=dict)

    @staticmethod
    def open(directory: Path, shapes: dict[str, TensorShape], rows: int | None = None) -> OptimizerState | None:
        """Reads the indexes of a checkpoint; None if it holds no optimizer state.

        shapes: parameter key -> its entry in the table of tensors. rows: see the class.
        """
        indexes = sorted((directory / layout.STATE).glob("rank_*.json"))
        locations: dict[str, list[SliceLocation]] = {}
        sizes = set()
        for path in indexes:
            facts = files.read_json(path)
            sizes.add(facts["model_size"])
            for position, entry in enumerate(facts["slices"]):
                location = SliceLocation(
                    path.with_suffix(".pt"),
                    position,
                    entry.get("model_rank", facts["model_rank"]),
                    entry["start"],
                    entry["stop"],
                    entry["step"],
                    tuple(entry["names"]),
                    tuple(entry.get("whole", ())),
                )
                locations.setdefault(entry["key"], []).append(location)
        if not locations:
            return None
        if len(sizes) != 1:
            raise RunError.of(f"slices of different tensor-parallel degrees {sorted(sizes)}", location=str(directory))
        return OptimizerState(sizes.pop(), locations, shapes, rows)

    def names(self, key: str) -> tuple[str, ...]:
        """The optimizer's names for what it keeps of a parameter; empty if it keeps nothing."""
        names = tuple(dict.fromkeys(name for location in self.locations.get(key, ()) for name in location.names))
        return names if MASTER in names or self.weights is None or not names else (*names, MASTER)

    def with_weights(self, weights: Callable[[str, int, int], Tensor]) -> OptimizerState:
        """The same with fp32 weights to take the MASTER from."""
        return replace(self, weights=weights)

    def step(self, key: str) -> int:
        """The number of updates the parameter has seen [steps]."""
        return self.locations[key][0].step

    def tensor_level_state(self, key: str) -> dict[str, Tensor]:
        """What the optimizer keeps of the global tensor that has another shape, by name; copies.

        Where the reader's vocabulary has more rows, those that the writer did not have are zero, as no token has
        trained them. Values of experts from several ranks are joined along their rows.
        """
        rows, now = self._as_written(key).shape[0], self.shapes[key].shape[0]
        found = {}
        for name, parts in self._tensor_level_parts(key).items():
            values = [self._load(one.file)[one.position][name] for _, one in sorted(parts.items())]
            value = torch.cat(values) if len(values) > 1 else values[0].clone()
            if now > rows and value.dim() and value.shape[0] == rows:
                value = torch.cat((value, value.new_zeros(now - rows, *value.shape[1:])))
            found[name] = value
        return found

    def _tensor_level_parts(self, key: str) -> dict[str, dict[int, SliceLocation]]:
        """Returns the slices that hold each value, by the start of the experts that they are about."""
        found: dict[str, dict[int, SliceLocation]] = {}
        for location in self.locations.get(key, ()):
            for name in location.tensor_level:
                found.setdefault(name, {})[location.start] = location
        return found

    def shard(self, key: str, name: str, *, model_rank: int, model_size: int) -> Tensor:
        """Optimizer state `name` of one tensor-parallel shard, flattened, fp32.

        Args:
            key: Key of the parameter in the parameter table.
            name: Name of the state, such as `exp_avg`.
            model_rank: Tensor-parallel rank of the shard.
            model_size: Tensor-parallel degree of the reader.
        """
        shape = self.shapes[key]
        if (
            name == MASTER
            and self.weights is not None
            and not any(MASTER in location.names for location in self.locations[key])
        ):
            return self.weights(key, model_rank, model_size)
        if shape.shard_dim is None:
            return self._source_shard(key, name, 0).flatten()
        written = self._as_written(key)
        if model_size == self.model_size and written is shape:
            return self._source_shard(key, name, model_rank).flatten()
        full = join_shards(written, [self._source_shard(key, name, rank) for rank in range(self.model_size)])
        full = pad_rows(shape, full, zero=name not in WEIGHTS)
        return take_shard(shape, full, model_rank, model_size).flatten()

    def _as_written(self, key: str) -> TensorShape:
        """The tensor with as many rows as the writer's vocabulary had, which may have been padded less."""
        shape = self.shapes[key]
        if self.rows is None or shape.kind not in VOCABULARY or self.rows >= shape.shape[0]:
            return shape
        return replace(shape, shape=(self.rows, *shape.shape[1:]))

    def _source_shard(self, key: str, name: str, model_rank: int) -> Tensor:
        """One tensor-parallel shard as it was cut when it was written. RunError if a piece of it is not there."""
        shape = self._as_written(key).local_shape(self.model_size)
        shard = torch.empty(shape, dtype=torch.float32)
        flat = shard.view(-1)
        covered = 0
        for location in self.locations[key]:
            if location.model_rank == model_rank and name in location.names:
                flat[location.start : location.stop] = self._load(location.file)[location.position][name]
                covered += location.stop - location.start
        if covered != flat.numel():
            raise RunError.of(
                f"optimizer state covers {covered} of {flat.numel()} elements of {key}",
                location=str(self.locations[key][0].file.parent),
                hint="a rank's file is missing; load another iteration, or set no_load_optim",
            )
        return shard

    def _load(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = files.read_tensors(file)
        return self._open[file]


def take_shard(shape: TensorShape, full: Tensor, model_rank: int, model_size: int) -> Tensor:
    """The shard of a global tensor that one tensor-parallel rank holds.

    Args:
        shape: Entry of the parameter table.
        full: The global tensor.
        model_rank: Tensor-parallel rank.
        model_size: Tensor-parallel degree.
    """
    if shape.shard_dim is None or model_size == 1:
        return full
    dim = shape.shard_dim
    parts = [full.narrow(dim, start, stop - start) for start, stop in shape.slices(model_rank, model_size)]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()


def join_shards(shape: TensorShape, shards: Sequence[Tensor]) -> Tensor:
    """The global tensor from the shards of all tensor-parallel ranks, in rank order."""
    if shape.shard_dim is None or len(shards) == 1:
        return shards[0]
    full = torch.empty(shape.shape, dtype=shards[0].dtype)
    for rank, shard in enumerate(shards):
        offset = 0
        for start, stop in shape.slices(rank, len(shards)):
            rows = shard.narrow(shape.shard_dim, offset, stop - start)
            full.narrow(shape.shard_dim, start, stop - start).copy_(rows)
            offset += stop - start
    return full


def pad_rows(shape: TensorShape, full: Tensor, *, zero: bool = False) -> Tensor:
    """A tensor over the vocabulary with the rows of padding that the reader has beyond the writer's.

    Each new row is the mean of the others, so its logit is the mean logit, and all n of them together take at most n
    of rows + n parts of the probability (the mean of exponentials is at least the exponential of the mean). zero: they
    are zero instead, as the optimizer's state of a row is that no token has trained.
    """
    missing = shape.shape[0] - full.shape[0]
    if missing <= 0:
        return full
    row = torch.zeros_like(full[:1]) if zero else full.float().mean(0, keepdim=True).to(full.dtype)
    return torch.cat((full, row.expand(missing, *full.shape[1:])))
