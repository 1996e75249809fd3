"""Keep index maps in files beside the data, so that they are computed once and shared by all ranks of a machine.

The names are the public ones, `<prefix>_<name>_indexmap_<N>ns_<seq>sl_<seed>s_packedpi_ac_..._idx.npy`, with a digest
of everything that the public names leave out and that changes the map: the lengths of all documents, the range of
documents, the number of passes. Another split, or other data under the same prefix, therefore gets other files.
Each file appears complete under its name or not at all. Where they cannot be written, each rank computes its own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron.data.index_map import IndexMap, build_index_map
from megatron.data.indexed import IndexedDataset

ARRAYS = {"documents": "doc", "samples": "sample", "shuffle": "shuffle"}
DIGEST_BYTES = 8


@dataclass(frozen=True)
class IndexRequest:
    """Everything that determines an index map.

    name: of the split, such as train or valid_2. samples: how many are asked for, or None where passes are.
    """

    dataset: IndexedDataset
    name: str
    documents: range
    seq_length: int
    samples: int | None
    epochs: int
    seed: int

    @cached_property
    def stem(self) -> str:
        """The files' common path."""
        public = f"{self.samples}ns_{self.seq_length}sl_{self.seed}s_packedpi_ac"
        return f"{self.dataset.prefix}_{self.name}_indexmap_{public}_{self._digest()}"

    def paths(self) -> dict[str, Path]:
        """The file of each array."""
        return {array: Path(f"{self.stem}_{short}_idx.npy") for array, short in ARRAYS.items()}

    def build(self) -> IndexMap:
        """Computes the map."""
        return build_index_map(
            self.dataset.sizes, self.documents, seq_length=self.seq_length, epochs=self.epochs, seed=self.seed
        )

    def _digest(self) -> str:
        lengths = hashlib.blake2b(np.ascontiguousarray(self.dataset.sizes).data, digest_size=DIGEST_BYTES)
        rest = (
            f"{self.documents.start}:{self.documents.stop} epochs {self.epochs} seq {self.seq_length} seed {self.seed}"
        )
        return hashlib.blake2b(f"{lengths.hexdigest()} {rest}".encode(), digest_size=DIGEST_BYTES).hexdigest()


def write_index_map(request: IndexRequest) -> OSError | None:
    """Computes and keeps the map, unless its files are there already; what stopped it from being kept, if anything."""
    paths = request.paths()
    if read_index_map(request) is not None:
        return None
    made = request.build()
    try:
        for array, path in paths.items():
            _write_array(path, getattr(made, array))
    except OSError as fault:
        return fault
    return None


def read_index_map(request: IndexRequest) -> IndexMap | None:
    """The kept map, memory-mapped, or None when it is not there or not whole."""
    try:
        arrays = {
            array: np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            for array, path in request.paths().items()
        }
    except (OSError, ValueError):
        return None
    documents, samples, shuffle = (arrays[array] for array in ARRAYS)
    whole = documents.shape == (len(request.documents) * request.epochs,) and samples.shape == (len(shuffle) + 1, 2)
    return IndexMap(documents, samples, shuffle, request.epochs) if whole else None


def index_maps(
    requests: list[IndexRequest], *, is_builder: bool, barrier: Callable[[], None]
) -> tuple[list[IndexMap], list[str]]:
    """The maps of all requests, and warnings for the user.

    is_builder: whether this rank writes for the others, who wait at the barrier; every rank must call this.
    """
    warnings = []
    if is_builder:
        for request in requests:
            fault = write_index_map(request)
            if fault is not None:
                kept = f"the index map {request.stem} cannot be kept ({fault.strerror})"
                warnings.append(f"{kept}: every rank computes it at each start")
    barrier()
    return [read_index_map(request) or request.build() for request in requests], warnings


def _write_array(path: Path, array: np.ndarray) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
