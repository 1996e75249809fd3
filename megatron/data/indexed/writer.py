"""Write token files (layout: reader.py) so that they appear under their final names only when complete.

Tokens go to `<prefix>.bin.partial` and lengths to `<prefix>.sizes.partial`, so that memory does not grow with them.
When all are written, the files are forced to disk and renamed, the .idx last: a pair that can be opened is a pair that
was finished. A process that is killed leaves `.partial` files, which nothing reads and the next attempt writes over or,
from a mark that was kept, goes on with.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from megatron.atomic import flush_to_disk, sync_directory
from megatron.data.indexed.metadata import DatasetCard, card_path
from megatron.data.indexed.reader import DTYPES, HEADER, LEGACY_HEADER, LEGACY_MAGIC, MAGIC, VERSION, bin_path, idx_path
from megatron.errors import RunError

LARGEST_ITEM = np.iinfo(np.int32).max
_AT_ONCE = 1 << 20  # items whose places are computed at a time


@dataclass(frozen=True)
class Mark:
    """How far a pair of files is written: what an interrupted work needs to go on."""

    items: int
    """Items that are written."""
    documents: int
    """Documents that are written."""
    tokens: int
    """Tokens that are written."""


class DatasetWriter:
    """A context: documents are added inside it, and the pair of files exists after it.

    On an exception inside the context nothing appears. Raises RunError when the disk fills up, another process is
    writing the same files, or the partial files are shorter than the mark says.

    Args:
        prefix: Common path of the files.
        dtype: Type of a token.
        legacy: Write the legacy index.
        mark: End of an earlier writer's work on the same files; what it wrote later is cut off.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype, *, legacy: bool = False, mark: Mark | None = None) -> None:
        self.prefix = str(prefix)
        self._legacy = legacy
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.keep = False
        self._code = next(code for code, known in DTYPES.items() if known == self.dtype)
        start = mark or Mark(0, 0, 0)
        self.items, self.documents, self.tokens = start.items, start.documents, start.tokens
        self.card: DatasetCard | None = None
        self._file = self._open(bin_path(prefix))
        self._sizes = self._open(self._beside("sizes"))
        # Only written when a document has several items; then a line of the document index for each document.
        self._ends = self._open(self._beside("documents")) if start.items != start.documents else None
        self._cut()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._report_full_disk():
                    self._finish()
        finally:
            for file in (self._file, self._sizes, self._ends):
                if file is not None:
                    with contextlib.suppress(OSError):  # the write error is already being raised
                        file.close()
            if kind is None or not self.keep:
                beside = (self._beside("sizes"), self._beside("documents"))
                for path in (bin_path(self.prefix), idx_path(self.prefix), card_path(self.prefix), *beside):
                    partial(path).unlink(missing_ok=True)

    def add_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """One document. Raises RunError when an id does not fit the dtype."""
        given = np.asarray(tokens)
        self.add_documents(given, np.array([len(given)]))

    def add_documents(self, tokens: np.ndarray, sizes: np.ndarray, items: np.ndarray | None = None) -> None:
        """Several documents at once: their tokens one after another, and the length of each item.

        items: of each document, where documents have several.
        """
        assert int(sizes.sum()) == len(tokens)
        if len(sizes) and int(sizes.max()) > LARGEST_ITEM:
            raise RunError.of(f"a document has {int(sizes.max())} tokens, and a data file takes {LARGEST_ITEM}")
        if tokens.dtype != self.dtype and len(tokens):
            self._check_range(tokens)
        with self._report_full_disk():
            self._file.write(np.ascontiguousarray(tokens, self.dtype).data)
            self._sizes.write(np.ascontiguousarray(sizes, "<i4").data)
            if items is not None or self._ends is not None:
                self._add_ends(np.ones(len(sizes), np.int64) if items is None else items)
        self.items += len(sizes)
        self.documents += len(sizes) if items is None else len(items)
        self.tokens += len(tokens)

    def mark(self) -> Mark:
        """Forces what was added to disk, and says how far it goes."""
        with self._report_full_disk():
            for file in (self._file, self._sizes, self._ends):
                if file is not None:
                    flush_to_disk(file)
        return Mark(self.items, self.documents, self.tokens)

    def _add_ends(self, items: np.ndarray) -> None:
        if self._ends is None:
            self._ends = self._open(self._beside("documents"))
            self._ends.truncate(0)
            for first in range(0, self.documents, _AT_ONCE):
                last = min(first + _AT_ONCE, self.documents)
                self._ends.write(np.arange(first + 1, last + 1, dtype="<i8").data)
        self._ends.write((np.cumsum(items, dtype="<i8") + self.items).data)

    def _cut(self) -> None:
        """Brings the partial files to the mark."""
        file_sizes = {self._file: self.tokens * self.dtype.itemsize, self._sizes: 4 * self.items}
        if self._ends is not None:
            file_sizes[self._ends] = 8 * self.documents
        for file, size in file_sizes.items():
            there = file.seek(0, os.SEEK_END)
            if there < size:
                for each in file_sizes:
                    each.close()
                raise RunError.of(
                    f"an earlier attempt left {there:,} of the {size:,} bytes that it had written",
                    location=str(bin_path(self.prefix)),
                    hint="leave out --resume, and start afresh",
                )
            if there > size:
                file.truncate(size)
            file.seek(size)

    def _check_range(self, tokens: np.ndarray) -> None:
        limits = np.iinfo(self.dtype)
        for extreme in (int(tokens.min()), int(tokens.max())):
            if not limits.min <= extreme <= limits.max:
                raise RunError.of(
                    f"the token id {extreme} does not fit {self.dtype.name} ({limits.min} to {limits.max})",
                    location=str(bin_path(self.prefix)),
                    hint="the vocabulary size given for these files is smaller than the tokenizer's ids",
                )

    def _finish(self) -> None:
        flush_to_disk(self._file)
        self._sizes.flush()
        with partial(idx_path(self.prefix)).open("wb") as index:
            if self._legacy:
                self._write_legacy(index)
            else:
                self._write_index(index)
            flush_to_disk(index)
        if self.card is not None:
            with partial(card_path(self.prefix)).open("wb") as card:
                card.write(self.card.to_json().encode("utf-8"))
                flush_to_disk(card)
        # An index of earlier data must never be seen beside the new tokens.
        idx_path(self.prefix).unlink(missing_ok=True)
        card_path(self.prefix).unlink(missing_ok=True)
        if self.card is not None:
            os.replace(partial(card_path(self.prefix)), card_path(self.prefix))
        for path in (bin_path(self.prefix), idx_path(self.prefix)):
            os.replace(partial(path), path)
        sync_directory(idx_path(self.prefix).parent)

    def _write_index(self, index: IO[bytes]) -> None:
        index.write(HEADER.pack(MAGIC, VERSION, self._code, self.items, self.documents + 1))
        for sizes in self._read(self._sizes, "<i4"):
            index.write(sizes.data)
        for sizes, ends in self._ends_of_items():
            index.write(((ends - sizes) * self.dtype.itemsize).astype("<i8").data)
        self._write_documents(index)

    def _write_legacy(self, index: IO[bytes]) -> None:
        width = self.dtype.itemsize
        counts = self.items, self.items, self.documents + 1
        index.write(LEGACY_HEADER.pack(LEGACY_MAGIC, VERSION, self._code, width, *counts))
        for first in range(0, self.items + 1, _AT_ONCE):
            index.write(np.arange(first, min(first + _AT_ONCE, self.items + 1), dtype="<i8").data)
        index.write(np.zeros(1, "<i8").data)
        for _, ends in self._ends_of_items():
            index.write(ends.astype("<i8").data)
        for sizes in self._read(self._sizes, "<i4"):
            index.write(sizes.astype("<i8").data)
        self._write_documents(index)

    def _write_documents(self, index: IO[bytes]) -> None:
        index.write(np.zeros(1, "<i8").data)
        for ends in self._document_ends():
            index.write(ends.data)

    def _ends_of_items(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The length of each item, and where it ends in the .bin [tokens], many at a time."""
        before = 0
        for sizes in self._read(self._sizes, "<i4"):
            ends = np.cumsum(sizes, dtype=np.int64) + before
            yield sizes, ends
            before = int(ends[-1])

    def _document_ends(self) -> Iterator[np.ndarray]:
        if self._ends is not None:
            self._ends.flush()
            yield from self._read(self._ends, "<i8")
            return
        for first in range(0, self.documents, _AT_ONCE):
            yield np.arange(first + 1, min(first + _AT_ONCE, self.documents) + 1, dtype="<i8")

    def _read(self, file: IO[bytes], dtype: str) -> Iterator[np.ndarray]:
        file.seek(0)
        while content := file.read(_AT_ONCE * np.dtype(dtype).itemsize):
            yield np.frombuffer(content, dtype)

    def _beside(self, name: str) -> Path:
        return Path(f"{self.prefix}.{name}")

    def _open(self, path: Path) -> IO[bytes]:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(partial(path), os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=1 << 20)
        if not _alone(file, partial(path)):
            file.close()
            raise RunError.of("another process is writing these files", location=str(path))
        return file

    @contextlib.contextmanager
    def _report_full_disk(self):  # noqa: ANN202
        try:
            yield
        except OSError as error:
            raise RunError.of(
                f"cannot write the data ({error.strerror})",
                location=str(bin_path(self.prefix)),
                hint="nothing appeared under the final name; make room and run again",
            ) from error


def _alone(file: IO[bytes], path: Path) -> bool:
    """Takes the lock of a file that is to be written; whether no other process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system without locks: two writers at once are the user's to avoid.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    try:
        # The other process may have finished and renamed the file between our opening and our lock.
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def partial(path: Path) -> Path:
    """The name of a file that is not complete yet."""
    return path.with_name(path.name + ".partial")
