"""Write token files (layout: indexed.py) so that they appear under their final names only when complete.

Tokens go to `<prefix>.bin.partial`. When all are written, both files are forced to disk and renamed, the .idx last: a
pair that can be opened is a pair that was finished. A process that is killed leaves `.partial` files, which nothing
reads and the next attempt writes over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from megatron.data.card import DatasetCard, card_path
from megatron.data.indexed import DTYPES, HEADER, MAGIC, VERSION, bin_path, idx_path
from megatron.errors import RunError

LARGEST_ITEM = np.iinfo(np.int32).max


class DatasetWriter:
    """A context: documents are added inside it, and the pair of files exists after it.

    prefix: the files' common path. dtype: of a token. On an exception inside the context nothing appears.
    Raises RunError when the disk fills up or another process is writing the same files.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next(code for code, known in DTYPES.items() if known == self.dtype)
        self._sizes: list[np.ndarray] = []
        self.documents = 0
        self.tokens = 0
        self.card: DatasetCard | None = None
        self._file = self._open(bin_path(prefix))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._told_when_full():
                    self._finish()
        finally:
            self._file.close()
            for path in (bin_path(self.prefix), idx_path(self.prefix), card_path(self.prefix)):
                partial(path).unlink(missing_ok=True)

    def add_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """One document. Raises RunError when an id does not fit the dtype."""
        given = np.asarray(tokens)
        self.add_documents(given, np.array([len(given)]))

    def add_documents(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Several documents at once: their tokens one after another, and the length of each."""
        assert int(sizes.sum()) == len(tokens)
        if len(sizes) and int(sizes.max()) > LARGEST_ITEM:
            raise RunError.of(f"a document has {int(sizes.max())} tokens, and a data file takes {LARGEST_ITEM}")
        if tokens.dtype != self.dtype and len(tokens):
            self._check_range(tokens)
        with self._told_when_full():
            self._file.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._sizes.append(np.asarray(sizes, "<i4"))
        self.documents += len(sizes)
        self.tokens += len(tokens)

    def _check_range(self, tokens: np.ndarray) -> None:
        limits = np.iinfo(self.dtype)
        for extreme in (int(tokens.min()), int(tokens.max())):
            if not limits.min <= extreme <= limits.max:
                raise RunError.of(
                    f"the token id {extreme} does not fit {self.dtype.name} ({limits.min} to {limits.max})",
                    where=str(bin_path(self.prefix)),
                    remedy="the vocabulary size given for these files is smaller than the tokenizer's ids",
                )

    def _finish(self) -> None:
        _to_disk(self._file)
        sizes = np.concatenate([np.empty(0, "<i4"), *self._sizes])
        starts = np.zeros(len(sizes), "<i8")
        np.cumsum(sizes[:-1], out=starts[1:], dtype=np.int64)
        starts *= self.dtype.itemsize
        with partial(idx_path(self.prefix)).open("wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, self._code, len(sizes), len(sizes) + 1))
            for array in (sizes, starts, np.arange(len(sizes) + 1, dtype="<i8")):
                index.write(array.data)
            _to_disk(index)
        if self.card is not None:
            partial(card_path(self.prefix)).write_text(self.card.to_json(), encoding="utf-8")
        # An index of earlier data must never be seen beside the new tokens.
        idx_path(self.prefix).unlink(missing_ok=True)
        card_path(self.prefix).unlink(missing_ok=True)
        if self.card is not None:
            os.replace(partial(card_path(self.prefix)), card_path(self.prefix))
        for path in (bin_path(self.prefix), idx_path(self.prefix)):
            os.replace(partial(path), path)
        folder = os.open(idx_path(self.prefix).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _open(self, path: Path) -> IO[bytes]:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(partial(path), os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=1 << 20)
        if not _alone(file, partial(path)):
            file.close()
            raise RunError.of("another process is writing these files", where=str(path))
        file.truncate(0)
        return file

    @contextlib.contextmanager
    def _told_when_full(self):  # noqa: ANN202
        try:
            yield
        except OSError as fault:
            raise RunError.of(
                f"cannot write the data ({fault.strerror})",
                where=str(bin_path(self.prefix)),
                remedy="nothing appeared under the final name; make room and run again",
            ) from fault


def _alone(file: IO[bytes], path: Path) -> bool:
    """Takes the lock of a file that is to be written; whether no other process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as fault:
        # A file system without locks: two writers at once are the user's to avoid.
        return fault.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    try:
        # The other process may have finished and renamed the file between our opening and our lock.
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def partial(path: Path) -> Path:
    """The name of a file that is not complete yet."""
    return path.with_name(path.name + ".partial")


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
