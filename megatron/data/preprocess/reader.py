"""Read text files in blocks of about a megabyte that end where a document ends, in one fixed order.

Memory stays bounded, blocks can be worked on side by side, and the same files always give the same blocks, so that work
can be taken up again at any of them. A block of a file that is not compressed is only a place in the file: whoever
works on it reads it.
"""

from __future__ import annotations

import contextlib
import json
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import IO, cast

from megatron.data.preprocess.compressed_files import DAMAGE, Salvaged, TarStream, decompressed
from megatron.data.preprocess.text_files import Kind, TextFile, is_hidden, kind_of, kind_of_member
from megatron.errors import RunError

BLOCK_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LENGTH_DIGITS = 16
NOT_TEXT = ("not read", "the member's name does not say that it is text")
EMPTY_FILE = ("empty", "it holds nothing")
_Content = tuple[str, Kind, bytes | None, bool]  # None: a member that is not text
_ENCRYPTED = 1  # bit of a zip member's flags


@dataclass(frozen=True)
class TextBlock:
    """Some whole documents of a file."""

    name: str
    """The file, and the member of an archive."""
    kind: Kind
    """Kind of the file."""
    content: bytes | None
    """The bytes, or None when `length` bytes from `start` of the file are meant."""
    start: int
    """Offset of its first byte in the file."""
    length: int
    """Its length [bytes]."""
    begins: bool
    """Whether it is the first of its file."""
    read_bytes: int
    """Bytes of all files, as they are on disk, that were read when the block ended."""
    lost: tuple[str, str] | None = None
    """In place of documents, why what stands here (a member of an archive, or the rest of a damaged file) gives none,
    as a reason and a detail.
    """

    def load(self) -> bytes:
        """The content, without a byte order mark. Raises RunError when the file changed while it was read."""
        content = self.content
        if content is None:
            with open(self.name, "rb", buffering=0) as file:
                file.seek(self.start)
                content = b"".join(_exactly(file, self.length, self.length))
            if len(content) != self.length:
                raise RunError.of("the file became shorter while it was read", location=self.name)
        return content.removeprefix(BYTE_ORDER_MARK) if self.begins else content


def read_blocks(files: Iterable[TextFile], block_bytes: int = BLOCK_BYTES) -> Iterator[TextBlock]:
    """The content of the files, in order. A file that is damaged or cut short ends with a block that says so."""
    before = 0
    for file in files:
        yield from read_file(file, block_bytes, before)
        before += file.bytes


def read_file(file: TextFile, block_bytes: int, before: int, span: range | None = None) -> Iterator[TextBlock]:
    """The blocks of one file.

    Args:
        file: The file.
        block_bytes: Size of a block [bytes].
        before: [bytes] of the files before it.
        span: Of an uncompressed file of lines, those that start in it alone.
    """
    if not file.bytes and file.kind is not Kind.FILE:
        yield TextBlock(str(file.path), Kind.FILE, b"", 0, 0, True, before, EMPTY_FILE)
        return
    if not file.compressed and file.kind is Kind.LINES:
        yield from _offsets(file, block_bytes, before, span or range(file.bytes))
        return
    if not file.compressed and file.kind is Kind.FILE:
        yield TextBlock(str(file.path), file.kind, None, 0, file.bytes, True, before + file.bytes)
        return
    with file.path.open("rb") as raw:
        try:
            for name, kind, content, begins in _contents(file, raw, block_bytes):
                read_bytes = before + min(raw.tell(), file.bytes)
                if content is None:
                    yield TextBlock(name, Kind.FILE, b"", 0, 0, True, read_bytes, NOT_TEXT)
                elif not content and kind is not Kind.FILE:
                    yield TextBlock(name, Kind.FILE, b"", 0, 0, True, read_bytes, EMPTY_FILE)
                else:
                    yield TextBlock(name, kind, content, 0, len(content), begins, read_bytes)
        except DAMAGE as error:
            detail = f"it cannot be read on from byte {raw.tell():,} of {file.bytes:,}: {error or type(error).__name__}"
            yield TextBlock(str(file.path), Kind.FILE, b"", 0, 0, True, before + file.bytes, ("damaged", detail))


def _offsets(file: TextFile, block_bytes: int, before: int, span: range) -> Iterator[TextBlock]:
    """Where lines of an uncompressed file end, about every block_bytes."""
    with file.path.open("rb", buffering=0) as raw:
        start = _line_start(raw, span.start, file.bytes)
        stop = _line_start(raw, span.stop, file.bytes)
        while start < stop:
            end = min(_line_start(raw, start + block_bytes, file.bytes), stop)
            yield TextBlock(str(file.path), file.kind, None, start, end - start, start == 0, before + end)
            start = end


def _line_start(raw: IO[bytes], position: int, size: int) -> int:
    """Where the first line starts at or after a position; the size of the file when there is none."""
    if position <= 0 or position >= size:
        return min(max(position, 0), size)
    raw.seek(position - 1)
    at = position - 1
    while chunk := raw.read(1 << 16):
        found = chunk.find(b"\n")
        if found >= 0:
            return at + found + 1
        at += len(chunk)
    return size


def _exactly(file: IO[bytes] | Salvaged, length: int, at_once: int) -> Iterator[bytes]:
    """So many bytes, fewer at the end of the file. at_once: since the length may be a damaged one."""
    while length and (chunk := file.read(min(length, at_once))):
        yield chunk
        length -= len(chunk)


def _contents(file: TextFile, raw: IO[bytes], block_bytes: int) -> Iterator[_Content]:
    name = str(file.path)
    if file.kind is Kind.ZIP:
        yield from _zip(name, raw, block_bytes)
        return
    found = kind_of(file.path)
    assert found is not None
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(decompressed(name, found[1], raw))
        if file.kind is Kind.TAR:
            yield from _tar(name, stream, block_bytes)
        else:
            yield from _documents(name, file.kind, stream, block_bytes)


def _tar(name: str, stream: Salvaged, block_bytes: int) -> Iterator[_Content]:
    tar = TarStream(stream)
    try:
        with tarfile.open(fileobj=cast(IO[bytes], tar), mode="r|") as archive:
            for member in archive:
                if member.isfile() and not is_hidden(PurePath(member.name)):
                    content = tar.member(archive.extractfile(member), member.offset_data)
                    kind = kind_of_member(PurePath(member.name))
                    yield from _member(f"{name}!{member.name}", kind, content, block_bytes)
    except DAMAGE:
        stream.check()  # says more than that the archive ends too early
        raise
    tar.check()


def _zip(name: str, raw: IO[bytes], block_bytes: int) -> Iterator[_Content]:
    with zipfile.ZipFile(raw) as archive:
        for member in archive.infolist():
            if member.flag_bits & _ENCRYPTED:
                raise zipfile.BadZipFile(f"{member.filename} is encrypted")
            if not member.is_dir() and not is_hidden(PurePath(member.filename)):
                kind = kind_of_member(PurePath(member.filename))
                with archive.open(member) as content:
                    yield from _member(f"{name}!{member.filename}", kind, content, block_bytes)


def _member(name: str, kind: tuple[Kind, str] | None, content: IO[bytes], block_bytes: int) -> Iterator[_Content]:
    if kind is None:
        yield name, Kind.FILE, None, True
        return
    with decompressed(name, kind[1], content) as text:
        yield from _documents(name, kind[0], text, block_bytes)


def _documents(name: str, kind: Kind, stream: Salvaged, block_bytes: int) -> Iterator[_Content]:
    """The documents of a stream in blocks; raises its damage behind all that is whole before it."""
    if kind is Kind.FILE:
        content = stream.read()
        stream.check()
        yield name, kind, content, True
        return
    chunks = _lines(stream, block_bytes) if kind is Kind.LINES else _lengths(stream, block_bytes)
    number = -1
    for number, content in enumerate(chunks):
        yield name, kind, content, number == 0
    stream.check()
    if number < 0:
        yield name, kind, b"", True


def _lines(stream: Salvaged, block_bytes: int) -> Iterator[bytes]:
    """The content in pieces that end after a line."""
    held: list[bytes] = []
    while content := stream.read(block_bytes):
        cut = content.rfind(b"\n") + 1
        if cut:
            held.append(content[:cut])
            lines = b"".join(held)
            held.clear()  # a line may be most of the memory
            yield lines
        held.append(content[cut:])
    last = b"".join(held)
    if last and (stream.error is None or _is_object(last)):
        yield last


def _is_object(line: bytes) -> bool:
    """Whether a line that damage follows, and no line end, is a whole one: the start of a JSON object is none."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lengths(stream: Salvaged, block_bytes: int) -> Iterator[bytes]:
    """The documents of a .dat with their lengths, in pieces. Raises EOFError, behind what was whole."""
    number = held_bytes = 0
    held: list[bytes] = []
    error = ""
    while digits := stream.read(LENGTH_DIGITS):
        number += 1
        if len(digits) != LENGTH_DIGITS or not digits.isdigit():
            error = f"document {number} does not start with its length in {LENGTH_DIGITS} digits"
            break
        content = b"".join(_exactly(stream, int(digits), BLOCK_BYTES))
        if len(content) != int(digits):
            error = f"document {number} should have {int(digits):,} bytes and has {len(content):,}"
            break
        held += [digits, content]
        held_bytes += LENGTH_DIGITS + len(content)
        if held_bytes >= block_bytes:
            yield b"".join(held)
            held, held_bytes = [], 0
    if held:
        yield b"".join(held)
    if error and stream.error is None:
        raise EOFError(error)


def parse_lengths(content: bytes) -> Iterator[bytes]:
    """The documents of a piece of a .dat."""
    at = 0
    while at < len(content):
        end = at + LENGTH_DIGITS + int(content[at : at + LENGTH_DIGITS])
        yield content[at + LENGTH_DIGITS : end]
        at = end
