"""Keep index maps in files beside the data, so that they are computed once and shared by all ranks of a machine.

The names are the public ones, `<prefix>_<name>_indexmap_<N>ns_<seq>sl_<seed>s_<packing>pi[_ac]_..._idx.npy`, with a
digest of everything that the public names leave out and that changes the map: the lengths of all documents, the range
of documents, those of them that are used, the number of passes. Another split, or other data under the same prefix,
therefore gets other files. N is None where passes are asked for and not samples. Each file appears complete under its
name or not at all. Where they cannot be written, each rank computes its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron.atomic import atomic_writer
from megatron.data.dataset.index_check import is_intact
from megatron.data.dataset.index_map import IndexMap, build_index_map
from megatron.data.dataset.packing import build_unpacked_map, usable_documents
from megatron.data.indexed.reader import IndexedDataset
from megatron.errors import ConfigError

ARRAYS = {"documents": "doc", "samples": "sample", "shuffle": "shuffle"}
DIGEST_BYTES = 8
PACKED = "packed"


class MapRequest(Protocol):
    """Everything that determines an index map of some kind, and where it is kept."""

    @property
    def stem(self) -> str:
        """The files' common path."""

    def paths(self) -> dict[str, Path]:
        """The file of each array, by the name of the map's attribute."""

    def build(self) -> Any:
        """Computes the map. ConfigError where no document can be used."""

    def checked(self, arrays: Mapping[str, np.ndarray]) -> Any:
        """Returns the map of stored arrays, or None where they cannot be it."""


@dataclass(frozen=True)
class IndexRequest:
    """Everything that determines an index map."""

    dataset: IndexedDataset
    """The token files."""
    name: str
    """Of the split, such as train or valid_2."""
    documents: range
    """Range of the documents to use."""
    seq_length: int
    """Length of a sample [tokens]."""
    samples: int | None
    """How many are asked for, or None where passes are."""
    epochs: int
    """Passes over the documents, for whole documents 0 where the samples decide."""
    seed: int
    """Seed of the order."""
    packing: str = PACKED
    """Of the documents, as pack_impl and allow_chopped say."""
    chopped: bool = True
    """Of the documents, as pack_impl and allow_chopped say."""
    labels: IndexedDataset | None = None
    """The data set's labels, which decide which whole documents are used."""
    framed: int = 0
    """Tokens that a sample adds to each document."""

    @cached_property
    def stem(self) -> str:
        """The files' common path."""
        chopped = "_ac" if self.chopped else ""
        public = f"{self.samples}ns_{self.seq_length}sl_{self.seed}s_{self.packing}pi{chopped}"
        return f"{self.dataset.prefix}_{self.name}_indexmap_{public}_{self._digest()}"

    def paths(self) -> dict[str, Path]:
        """The file of each array."""
        return {array: Path(f"{self.stem}_{short}_idx.npy") for array, short in ARRAYS.items()}

    def build(self) -> IndexMap:
        """Computes the map. ConfigError where no document can be used."""
        sizes = self._sizes
        if self.packing == PACKED:
            return build_index_map(
                sizes, self.documents, seq_length=self.seq_length, epochs=self.epochs, seed=self.seed
            )
        if not len(self.usable):
            longer = "" if self.chopped else f", longer than {self.seq_length + 1} tokens"
            ways = "" if self.chopped else "set allow_chopped, raise seq_length, or "
            raise ConfigError.of(
                f"no document of {self.dataset.prefix} can be a sample of {self.name}: they are empty{longer} or "
                "without labels",
                key="pack_impl",
                value=self.packing,
                hint=f"{ways}use pack_impl: packed",
            )
        return build_unpacked_map(
            sizes,
            self.usable,
            seq_length=self.seq_length,
            packed=self.packing != "unpacked",
            seed=self.seed,
            samples=self.samples or 0,
            epochs=self.epochs,
        )

    @cached_property
    def usable(self) -> np.ndarray:
        """The documents that the map holds in each pass."""
        if self.packing == PACKED:
            return np.arange(self.documents.start, self.documents.stop)
        return usable_documents(
            self.dataset.sizes,
            self.documents,
            seq_length=self.seq_length,
            chopped=self.chopped,
            labels=self.labels,
        )

    def checked(self, arrays: Mapping[str, np.ndarray]) -> IndexMap | None:
        """Returns the map of stored arrays, or None where they cannot be it."""
        documents, samples, shuffle = (arrays[array] for array in ARRAYS)
        once = len(self.usable)
        epochs = self.epochs or len(documents) // max(once, 1)
        if documents.shape != (once * epochs,) or samples.shape != (len(shuffle) + 1, 2):
            return None
        found = IndexMap(documents, samples, shuffle, epochs)
        return found if is_intact(found, self.usable) else None

    @cached_property
    def _sizes(self) -> np.ndarray:
        return self.dataset.sizes + np.int32(self.framed) if self.framed else self.dataset.sizes

    def _digest(self) -> str:
        lengths = hashlib.blake2b(np.ascontiguousarray(self._sizes).data, digest_size=DIGEST_BYTES)
        rest = (
            f"{self.documents.start}:{self.documents.stop} epochs {self.epochs} seq {self.seq_length} seed {self.seed}"
        )
        if self.packing != PACKED:
            rest += f" of {hashlib.blake2b(self.usable.data, digest_size=DIGEST_BYTES).hexdigest()}"
        return hashlib.blake2b(f"{lengths.hexdigest()} {rest}".encode(), digest_size=DIGEST_BYTES).hexdigest()


def write_index_map(request: MapRequest) -> OSError | None:
    """Computes and keeps the map, unless its files are there already; what stopped it from being kept, if anything."""
    paths = request.paths()
    if read_index_map(request) is not None:
        return None
    made = request.build()
    try:
        for array, path in paths.items():
            with atomic_writer(path, durable=True) as file:
                np.save(file, getattr(made, array), allow_pickle=False)
    except OSError as error:
        return error
    return None


def read_index_map(request: MapRequest) -> Any:
    """The kept map, memory-mapped, or None when it is not there, not whole or damaged."""
    try:
        arrays = {
            array: np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            for array, path in request.paths().items()
        }
    except (OSError, ValueError, EOFError):
        return None
    return request.checked(arrays)


def index_maps(
    requests: Sequence[MapRequest], *, is_builder: bool, barrier: Callable[[], None]
) -> tuple[list[Any], list[str]]:
    """The maps of all requests, and warnings for the user.

    is_builder: whether this rank writes for the others, who wait at the barrier; every rank must call this.
    """
    warnings = []
    if is_builder:
        for request in requests:
            error = write_index_map(request)
            if error is not None:
                problem = f"the index map {request.stem} cannot be kept ({error.strerror})"
                warnings.append(f"{problem}: every rank computes it at each start")
    barrier()
    return [read_index_map(request) or request.build() for request in requests], warnings
