"""Embeddings of a corpus on disk: `vectors.npy` [passages, d], `done.npy` [blocks] and `index.json`.

`index.json` says what the vectors were made of and by. Ranks fill the file by blocks of passages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.atomic import atomic_path
from megatron.data.indexed.marked_rows import MarkedRows, create_rows
from megatron.errors import ConfigError, RunError

KEY = "embedding_path"
VECTORS, DONE, HEADER = "vectors.npy", "done.npy", "index.json"
VERSION = 1
BLOCK = 1024
"""Passages that are marked together."""
SAME = 0.02
"""Largest deviation of an embedding, as a share of its largest value, at which a model is the same."""


class EmbeddingFile(MarkedRows):
    """The vectors of a folder, which are its rows."""

    def __init__(self, folder: Path, *, writes: bool) -> None:
        """Opens a folder. Raises RunError where it has no embeddings, or their size is another one.

        Args:
            folder: the folder.
            writes: open it for writing.
        """
        self.facts = header(folder)
        try:
            super().__init__(folder / VECTORS, folder / DONE, block=BLOCK, writes=writes)
        except (OSError, ValueError) as error:
            raise RunError.of(f"the embeddings cannot be read: {error}", key=KEY, location=str(folder)) from None
        if self.rows.shape != (self.facts["passages"], self.facts["width"]):
            what = f"{VECTORS} has the shape {list(self.rows.shape)}, {HEADER} has another one"
            raise RunError.of(what, key=KEY, location=str(folder), hint="remove the folder and embed again")

    def require_complete(self, folder: Path, *, key: str, hint: str) -> None:
        """Raises ConfigError where blocks are missing.

        Args:
            folder: that the message names.
            key: of the configuration, which names it.
            hint: what to do.
        """
        if self.missing:
            what = f"{len(self.missing)} blocks of its embeddings are missing"
            raise ConfigError.of(what, key=key, value=str(folder), hint=hint)


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


def is_same(before: Sequence[float], now: Sequence[float]) -> bool:
    """Returns whether two embeddings of one text are those of the same model."""
    one, other = np.asarray(before, np.float64), np.asarray(now, np.float64)
    return one.shape == other.shape and not np.abs(one - other).max() > SAME * np.abs(one).max()


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
        create_rows(folder / VECTORS, folder / DONE, np.dtype(facts["dtype"]), shape, block=BLOCK)
        with atomic_path(folder / HEADER) as temporary:
            temporary.write_text(json.dumps({"version": VERSION, **facts}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError.of(f"it cannot be written: {error.strerror}", key=KEY, location=str(folder)) from None
