"""Read documents from text files: JSON lines (.jsonl, .json) or one document a file (.txt), compressed or not.

.gz, .bz2 and .xz are read with the standard library, .zst with the package `zstandard`. Files are read in blocks of
about a megabyte that end where a line ends, so that memory stays bounded and blocks can be worked on side by side.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import ConfigError, Mistake, RunError

BLOCK_BYTES = 1 << 20
JSON_LINES = (".jsonl", ".json")
PLAIN_TEXT = (".txt",)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class TextFile:
    """A file to read. whole: it is one document, rather than one a line. bytes: its size on disk."""

    path: Path
    whole: bool
    bytes: int


@dataclass(frozen=True)
class Block:
    """Some whole lines of a file, or a whole file.

    first_line: number of the first line in the file, from 1. read_bytes: bytes of all files, as they lie on disk, that
    were read when the block ended.
    """

    file: TextFile
    first_line: int
    content: bytes
    read_bytes: int


def find_text_files(names: Iterable[str], *, key: str = "input") -> list[TextFile]:
    """The files of those names, in the order given; a directory stands for the text files below it, sorted.

    Raises ConfigError with every file that is missing, empty or of an unknown kind. key: what named them.
    """
    found: list[TextFile] = []
    mistakes: list[Mistake] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            below = [child for child in sorted(path.rglob("*")) if child.is_file() and _kind(child) is not None]
            if not below:
                mistakes.append(Mistake("there is no text file in this directory", key=key, value=name))
            paths = below
        else:
            paths = [path]
        for each in paths:
            known = _known(each, key)
            if isinstance(known, Mistake):
                mistakes.append(known)
            else:
                found.append(known)
    ConfigError.raise_any(mistakes)
    if not found:
        raise ConfigError.of("no input file is named", key=key)
    return found


def _known(path: Path, key: str) -> TextFile | Mistake:
    name = str(path)
    whole = _kind(path)
    if whole is None:
        kinds = ", ".join((*JSON_LINES, *PLAIN_TEXT))
        remedy = f"name {kinds} files, or one of them compressed as {', '.join(COMPRESSED)}"
        return Mistake("files of this kind are not read", key=key, value=name, remedy=remedy)
    try:
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except OSError as fault:
        return Mistake(f"cannot read the file ({fault.strerror})", key=key, value=name)
    if size == 0:
        return Mistake("the file is empty", key=key, value=name, remedy="leave it out, or make it again")
    return TextFile(path, whole, size)


def _kind(path: Path) -> bool | None:
    """Whether the file is one document (True) or one a line (False); None for a kind that is not known."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    if last in PLAIN_TEXT:
        return True
    return False if last in JSON_LINES else None


def read_blocks(files: Iterable[TextFile], block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """The content of the files, in order. Raises RunError when a compressed file is damaged or cut short."""
    before = 0
    for file in files:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(file.path.open("rb"))
            stream = stack.enter_context(_decompressed(file.path, raw))
            line = 1
            try:
                for content in _pieces(stream, None if file.whole else block_bytes):
                    yield Block(file, line, content, before + raw.tell())
                    line += content.count(b"\n")
            except DAMAGE as fault:
                raise RunError.of(
                    f"the file cannot be read on from byte {raw.tell():,} of {file.bytes:,} ({fault})",
                    where=str(file.path),
                    remedy="it is damaged or was cut short; fetch it again",
                ) from fault
        before += file.bytes


def _pieces(stream: io.BufferedIOBase, block_bytes: int | None) -> Iterator[bytes]:
    """The content without a byte order mark: all at once, or in pieces that end after a line."""
    if block_bytes is None:
        yield stream.read().removeprefix(BYTE_ORDER_MARK)
        return
    held: list[bytes] = []
    first = True
    while content := stream.read(max(block_bytes, len(BYTE_ORDER_MARK))):
        if first:
            content = content.removeprefix(BYTE_ORDER_MARK)
            first = False
        cut = content.rfind(b"\n") + 1
        if cut:
            yield b"".join([*held, content[:cut]])
            held = []
        held.append(content[cut:])
    if any(held):
        yield b"".join(held)


def _decompressed(path: Path, raw: io.BufferedReader) -> io.BufferedIOBase:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(raw)
    if suffix == ".bz2":
        return bz2.open(raw)
    if suffix == ".xz":
        return lzma.open(raw)
    if suffix == ".zst":
        return _zstandard(path, raw)
    return raw


def _zstandard(path: Path, raw: io.BufferedReader) -> io.BufferedIOBase:
    try:
        zstandard = importlib.import_module("zstandard")
    except ModuleNotFoundError as fault:
        raise ConfigError.of(
            "reading .zst needs the package zstandard, which is not installed",
            where=str(path),
            remedy="pip install zstandard",
        ) from fault
    reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
    return io.BufferedReader(reader, BLOCK_BYTES)
