"""Neighbours of a run's samples on disk: `retro.json`, and `neighbors_<split>.npy` and `done_<split>.npy` of each.

Neighbours are numbers of chunks, int32 [samples, l, k], the nearest first; -1 where there are no more. They belong to
the samples of one configuration, of which `retro.json` has a fingerprint. Blocks of samples are marked when their
neighbours are on disk; the tool finds what is missing when it runs again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron.atomic import atomic_path
from megatron.data.dataset.gpt_dataset import Samples
from megatron.data.indexed.marked_rows import MarkedRows, create_rows
from megatron.data.retro.chunks import KEY
from megatron.errors import ConfigError, RunError

HEADER = "retro.json"
PROBE = "probe"
"""Name of the embedding of a fixed text in it."""
INDEX = "index"
"""Name of the index that neighbours were found by, null for the exact search."""
VERSION = 1
BLOCK = 64
"""Samples that are marked together."""
COMPARED = 64
"""Samples whose tokens make the fingerprint of a split."""
HINT = "run tools/build_retro_database.py with the configuration of the run"


def fingerprint(samples: Samples, count: int) -> str:
    """Returns a fingerprint of the first samples: SHA-256 of the tokens of some of them.

    Args:
        samples: of a split.
        count: how many of them a run reads.
    """
    found, tokens = hashlib.sha256(str(count).encode()), np.empty(samples.sample_length, np.int64)
    for number in np.unique(np.linspace(0, count - 1, min(count, COMPARED)).astype(np.int64)):
        samples.read(int(number), tokens)
        found.update(tokens.tobytes())
    return found.hexdigest()[:16]


class NeighborFile(MarkedRows):
    """The neighbours of a split, a row a sample."""

    def __init__(self, folder: Path, split: str, *, writes: bool) -> None:
        """Opens the files. Raises RunError where there are none.

        Args:
            folder: with the files.
            split: train, valid or test.
            writes: open them for writing.
        """
        try:
            super().__init__(*_files(folder, split), block=BLOCK, writes=writes)
        except (OSError, ValueError) as error:
            what = f"there are no neighbours of the split {split}: {error}"
            raise RunError.of(what, key=KEY, location=str(folder), hint=HINT) from None


def create(folder: Path, split: str, shape: tuple[int, int, int]) -> None:
    """Makes the files of a split, without neighbours. shape: samples, chunks of a sample, neighbours of a chunk."""
    create_rows(*_files(folder, split), np.dtype(np.int32), shape, block=BLOCK)


def _files(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"neighbors_{split}.npy", folder / f"done_{split}.npy"


def read_header(folder: Path) -> dict[str, Any]:
    """Returns `retro.json` of a folder. Raises RunError where there is none that can be read."""
    try:
        found: dict[str, Any] = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError.of(f"there is no database: {error}", key=KEY, location=str(folder), hint=HINT) from None
    if found.get("version") != VERSION:
        what = f"its database has the version {found.get('version')}, this program reads {VERSION}"
        raise RunError.of(what, key=KEY, location=str(folder), hint=HINT)
    return found


def write_header(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes `retro.json`."""
    with atomic_path(folder / HEADER) as temporary:
        temporary.write_text(json.dumps({"version": VERSION, **facts}, indent=2) + "\n", encoding="utf-8")


def require_same(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ConfigError that names what a database was made of otherwise.

    Args:
        folder: of the database.
        found: facts of the database.
        expected: facts of this run.
    """
    other = [name for name, value in expected.items() if found.get(name) != value]
    if other:
        listed = "; ".join(f"{name}: {found.get(name)}, now {expected[name]}" for name in other)
        what = f"its neighbours are those of another run: {listed}"
        raise ConfigError.of(what, key=KEY, value=str(folder), hint=f"name another folder, or {HINT}")
