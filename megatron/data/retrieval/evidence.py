"""A corpus of passages in the form of DPR's tsv file, read by number (arXiv:2004.04906).

A line is an id, a text and, if there is one, a title, with tabs between and quotes as csv has them. A first line that
begins with "id" is a header.
"""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np

from megatron.data.retrieval.questions import Passage
from megatron.errors import RunError

HINT = "give a tsv with id, text and title, as psgs_w100.tsv of DPR"
_BLOCK = 1 << 24  # [bytes] read at once


class Evidence:
    """The passages of a file; its text stays on disk."""

    def __init__(self, path: Path) -> None:
        """Finds the lines of the file. Raises RunError for one that cannot be read or has none."""
        self.path = path
        found, digest, position = [np.zeros(1, np.int64)], hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position + 1)
                    position += len(block)
        except OSError as error:
            raise RunError.of(f"it cannot be read: {error.strerror}", location=str(path)) from None
        starts = np.concatenate(found)
        if starts[-1] != position:
            starts = np.append(starts, position)  # a last line without its end
        self.digest = digest.hexdigest()
        """SHA-256 of the file."""
        self._starts, self._first = starts, 0
        with path.open("rb") as file:
            self._first = int(file.readline().split(b"\t")[0].strip(b'"\xef\xbb\xbf') == b"id")
        if len(self) < 1:
            raise RunError.of("it has no passage", location=str(path), hint=HINT)

    def __len__(self) -> int:
        return len(self._starts) - 1 - self._first

    def passage(self, number: int) -> tuple[str, Passage]:
        """Returns the id and the passage of a line. Raises RunError that names the line."""
        line = number + self._first
        start, end = self._starts[line : line + 2]
        with self.path.open("rb") as file:
            file.seek(start)
            read = file.read(end - start)
        try:
            cells = next(csv.reader([read.decode("utf-8-sig").rstrip("\r\n")], delimiter="\t", strict=True), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise RunError.of(f"line {line + 1} is no tsv: {error}", location=str(self.path), hint=HINT) from None
        if not 2 <= len(cells) <= 3:
            what = f"line {line + 1} has {len(cells)} cells"
            raise RunError.of(what, location=str(self.path), hint=HINT)
        return cells[0], Passage(cells[2] if len(cells) == 3 else "", cells[1])
