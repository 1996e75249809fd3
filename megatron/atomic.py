"""Atomic writes: a reader sees the old file or the complete new one, never a part.

The content goes to a temporary file in the same folder, which then takes the name by `os.replace`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, TextIO


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields the path of a temporary file in the same folder, which is made; renames the file when the block ends.

    The temporary file is removed when the block raises. Its name ends in the process id, so that processes which write
    the same file do not meet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_writer(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Yields a binary file that appears under `path` when the block ends without an exception.

    durable: content and name survive a power cut once the block has ended.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file
        if durable:
            flush_to_disk(file)
    if durable:
        sync_directory(path.parent)


def write_atomic(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Writes a file atomically; text as UTF-8, its line ends as they are. durable: as in `atomic_writer`."""
    with atomic_writer(path, durable=durable) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def open_lines(path: Path) -> TextIO:
    """Opens a file of lines, UTF-8, to append to it; a last line that an earlier process left incomplete is ended."""
    torn = _ends_inside_a_line(path)
    file = path.open("a", encoding="utf-8")
    if torn:
        file.write("\n")
    return file


def _ends_inside_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def flush_to_disk(file: IO[bytes]) -> None:
    """Returns when what was written to the file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
