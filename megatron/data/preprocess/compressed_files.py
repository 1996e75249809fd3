"""What compressed files, and members of archives, hold: up to where they are damaged.

A file that was cut short, or has something else behind its end, gives every byte before that place.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import importlib
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from megatron.errors import ConfigError

AT_ONCE = 1 << 16  # bytes asked of a decompressor at once: so much before damage inside the file may be lost
_ZSTD_BYTES = 1 << 15  # decompressed at once; what they become is held in memory
_ZSTD_HELD = 1 << 20
DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, NotImplementedError)
"""What the readers of compressed files and archives raise; zipfile's NotImplementedError is an unknown compression."""


class Salvaged:
    """A stream that gives all that comes before damage, and then its end; `error` then says what the damage is.

    The readers of the standard library raise instead, and what they had in hand is lost.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        """So many bytes, or all for -1; fewer at the end and before damage."""
        chunks, remaining = [], size
        while self.error is None and remaining:
            try:
                chunk = self._stream.read1(AT_ONCE if remaining < 0 else min(remaining, AT_ONCE))
            except DAMAGE as error:
                self.error = error
                break
            if not chunk:
                break
            chunks.append(chunk)
            remaining = remaining if remaining < 0 else remaining - len(chunk)
        return b"".join(chunks)

    def check(self) -> None:
        """Raises what the damage was, if there was any."""
        if self.error is not None:
            raise self.error


class TarStream:
    """The bytes of a tar, with zeros behind their end: tarfile throws the start of what it cannot read whole away.

    Zeros are the end of an archive to it; `member` takes them off again.
    """

    def __init__(self, stream: Salvaged) -> None:
        self._stream = stream
        self._given = 0
        self._ended = False

    def read(self, size: int) -> bytes:
        """So many bytes."""
        content = self._stream.read(size)
        self._given += len(content)
        self._ended = self._ended or len(content) < size
        return content.ljust(size, b"\0")

    def check(self) -> None:
        """Raises what the damage was, if there was any: tarfile takes a header that was cut for the end."""
        self._stream.check()
        if self._ended and self._given % tarfile.BLOCKSIZE:
            raise EOFError("the archive does not end behind a whole block")

    def member(self, content: Any, start: int) -> Any:
        """What is really there of a member. content: as tarfile reads it. start: its first byte in the tar."""
        return _Member(self, content, start)

    def real(self, start: int, stop: int) -> int:
        """How many bytes from start to stop are there."""
        return max(min(stop, self._given) - start, 0) if self._ended else stop - start


class _Member:
    def __init__(self, stream: TarStream, content: Any, start: int) -> None:
        self._stream = stream
        self._content = content
        self._at = start
        self._cut = False

    def read1(self, size: int) -> bytes:
        chunk: bytes = b"" if self._cut else self._content.read1(size)
        real = self._stream.real(self._at, self._at + len(chunk))
        self._cut = self._cut or real < len(chunk)
        self._at += real
        if self._cut and not real:
            self._stream.check()
            raise EOFError("the archive ends inside a member")
        return chunk[:real]

    def read(self, size: int = -1) -> bytes:
        return self.read1(size)  # fewer bytes than asked for are no end to the decompressors


@contextlib.contextmanager
def decompressed(name: str, compression: str, raw: IO[bytes]) -> Iterator[Salvaged]:
    """The content of a file or a member. name: for messages. Raises ConfigError where .zst cannot be read."""
    if compression == ".gz":
        with gzip.open(raw) as stream:
            yield Salvaged(stream)
    elif compression in _STREAMS:
        reader: Any = _Streams(raw, _STREAMS[compression])
        yield Salvaged(io.BufferedReader(reader, AT_ONCE))
    else:
        yield Salvaged(_zstandard(name, raw) if compression == ".zst" else raw)


_STREAMS: dict[str, Callable[[], Any]] = {".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}


class _Streams(io.RawIOBase):
    """Streams of xz or bzip2 one after another, zeros between them and at the end being padding (.xz format, 2.2).

    The readers of the standard library take whatever begins no stream for the end of the file, padding too, and say
    nothing; this one raises what the decompressor says of it.
    """

    def __init__(self, raw: IO[bytes], make: Callable[[], Any]) -> None:
        self._raw, self._make = raw, make
        self._stream = make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while True:
            data = b""
            if self._stream.eof:
                data = self._next_stream()
                if not data:
                    return 0
                self._stream = self._make()
            elif self._stream.needs_input:
                data = self._raw.read(AT_ONCE)
                if not data:
                    raise EOFError("compressed file ended before the end of its last stream")
            found: bytes = self._stream.decompress(data, len(buffer))
            if found:
                buffer[: len(found)] = found
                return len(found)

    def _next_stream(self) -> bytes:
        """Returns the first bytes behind the stream that are no padding; none at the end of the file."""
        data: bytes = self._stream.unused_data.lstrip(b"\0")
        while not data:
            chunk = self._raw.read(AT_ONCE)
            if not chunk:
                break
            data = chunk.lstrip(b"\0")
        return data


def _zstandard(name: str, raw: IO[bytes]) -> IO[bytes]:
    try:
        zstandard = importlib.import_module("zstandard")
    except ModuleNotFoundError as error:
        raise ConfigError.of(
            "reading .zst needs the package zstandard, which is not installed",
            location=name,
            hint="pip install zstandard",
        ) from error
    # Files of `zstd --long=31` reach back so far; memory is taken as a file needs it.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << zstandard.WINDOWLOG_MAX)
    reader: Any = _Zstandard(raw, decompressor, zstandard.ZstdError)
    return io.BufferedReader(reader, _ZSTD_HELD)


class _Zstandard(io.RawIOBase):
    """Frames of Zstandard one after another. The package's own reader takes a frame that was cut short for a whole one;
    this one raises EOFError.
    """

    def __init__(self, raw: IO[bytes], decompressor: Any, error: type[Exception]) -> None:
        self._raw = raw
        self._decompressor = decompressor
        self._error = error
        self._frame = decompressor.decompressobj()
        self._inside = False
        self._held = b""
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while not self._held:
            chunk = self._left or self._raw.read(_ZSTD_BYTES)
            self._left = b""
            if not chunk:
                if self._inside:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            try:
                self._held = self._frame.decompress(chunk)
            except self._error as error:
                raise OSError(str(error)) from error
            self._inside = not self._frame.eof
            if self._frame.eof:
                self._left = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
        size = min(len(buffer), len(self._held))
        buffer[:size] = self._held[:size]
        self._held = self._held[size:]
        return size
