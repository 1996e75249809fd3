"""Embeddings of a corpus on disk: `vectors.npy` [passages, d], `done.npy` [blocks] and `index.json`.

`index.json` says what the vectors were made of and by. Ranks write blocks of passages of their own into the same file,
so a folder for several hosts is one that they share. A block is marked when its vectors are on disk; what is missing
is embedded when the same command runs again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron.atomic import atomic_path
from megatron.errors import ConfigError, RunError

KEY = "embedding_path"
VECTORS, DONE, HEADER = "vectors.npy", "done.npy", "index.json"
VERSION = 1
BLOCK = 1024
"""Passages that are marked together."""


class EmbeddingFile:
    """The vectors of a folder."""

    def __init__(self, folder: Path, *, writes: bool) -> None:
        """Opens a folder. Raises RunError where it has no embeddings, or their size is another one.

        Args:
            folder: the folder.
            writes: open it for writing.
        """
        self.facts = header(folder)
        mode: Any = "r+" if writes else "r"
        try:
            self.vectors = np.load(folder / VECTORS, mmap_mode=mode)
            self._done = np.load(folder / DONE, mmap_mode=mode)
        except (OSError, ValueError) as error:
            raise RunError.of(f"the embeddings cannot be read: {error}", key=KEY, location=str(folder)) from None
        if self.vectors.shape != (self.facts["passages"], self.facts["width"]):
            what = f"{VECTORS} has the shape {list(self.vectors.shape)}, {HEADER} has another one"
            raise RunError.of(what, key=KEY, location=str(folder), hint="remove the folder and embed again")

    @property
    def missing(self) -> list[int]:
        """Numbers of the blocks without vectors."""
        return [int(block) for block in np.flatnonzero(self._done == 0)]

    def passages(self, block: int) -> range:
        """Returns the passages of a block."""
        return range(block * BLOCK, min((block + 1) * BLOCK, len(self.vectors)))

    def write(self, block: int, vectors: np.ndarray) -> None:
        """Stores the vectors of a block [passages of the block, d], then marks it."""
        own = self.passages(block)
        self.vectors[own.start : own.stop] = vectors
        self.vectors.flush()
        self._done[block] = 1
        self._done.flush()


def header(folder: Path) -> dict[str, Any]:
    """Returns `index.json` of a folder. Raises RunError where there is none that can be read."""
    hint = "make embeddings with tools/embed_passages.py"
    try:
        found: dict[str, Any] = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError.of(f"there are no embeddings: {error}", key=KEY, location=str(folder), hint=hint) from None
    if found.get("version") != VERSION:
        what = f"its embeddings have the version {found.get('version')}, this program reads {VERSION}"
        raise RunError.of(what, key=KEY, location=str(folder), hint=hint)
    return found


def require_same(folder: Path, expected: Mapping[str, Any]) -> None:
    """Raises ConfigError that names what the embeddings of a folder were made of otherwise."""
    found = header(folder)
    other = [name for name, value in expected.items() if found.get(name) != value]
    if other:
        listed = "; ".join(f"{name}: {found.get(name)}, now {expected[name]}" for name in other)
        hint = "name another folder, or the corpus, tokenizer and model that they were made with"
        raise ConfigError.of(f"its embeddings were made otherwise: {listed}", key=KEY, value=str(folder), hint=hint)


def create(folder: Path, facts: Mapping[str, Any]) -> None:
    """Makes the files of a folder, without vectors; those of the same facts stay.

    Args:
        folder: the folder.
        facts: passages, width, dtype, and what else decides the vectors.

    Raises ConfigError where the folder has embeddings of other facts, and RunError where it cannot be written.
    """
    if (folder / HEADER).exists():
        require_same(folder, facts)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shape = (facts["passages"], facts["width"])
        np.lib.format.open_memmap(folder / VECTORS, "w+", np.dtype(facts["dtype"]), shape).flush()
        blocks = (-(-facts["passages"] // BLOCK),)
        np.lib.format.open_memmap(folder / DONE, "w+", np.dtype(np.uint8), blocks).flush()
        with atomic_path(folder / HEADER) as temporary:
            temporary.write_text(json.dumps({"version": VERSION, **facts}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError.of(f"it cannot be written: {error.strerror}", key=KEY, location=str(folder)) from None
