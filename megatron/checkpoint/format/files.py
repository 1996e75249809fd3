"""Writing files that are either whole or not there, and reading them without running code.

Everything is written, flushed and fsynced; names are given by rename, which the file system does at once. Reading
goes through torch.load(weights_only=True), which refuses a pickle that would run anything.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch

from megatron.atomic import flush_to_disk
from megatron.errors import ConfigError, RunError

_CHUNK = 1 << 20
_ADVICE, _CAUSE = "Weights only load failed", "WeightsUnpickler error:"
_UNREADABLE = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, LookupError),
    *(AttributeError, TypeError, AssertionError, struct.error),
)
"""What torch.load raises for damaged files: whatever the code meets that trusted them."""


@dataclass(frozen=True)
class Written:
    """A file that is on the disk. size [bytes], sha256: of what was meant to be written, in hexadecimal."""

    path: Path
    """The file."""
    size: int
    """Its size [bytes]."""
    sha256: str
    """Hash of what was meant to be written."""


class _Counting:
    """A file that measures and digests what passes through it. error: the first thing that went wrong in writing."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        for start in range(0, len(view), _CHUNK):
            piece = view[start : start + _CHUNK]
            self.digest.update(piece)
            try:
                self._file.write(piece)
            except OSError as error:
                self.error = self.error or error
                raise
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()


def write_tensors(path: Path, content: Any) -> Written:
    """torch.save to `path`, on the disk when this returns. OSError where the disk is full or refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        counting = _Counting(file)
        try:
            torch.save(content, counting)  # type: ignore[arg-type]
        except RuntimeError:
            if counting.error is not None:  # torch reports an offset, not that the disk is full
                raise counting.error from None
            raise
        flush_to_disk(file)
    return Written(path, counting.size, counting.digest.hexdigest())


@contextmanager
def sharing_the_interpreter() -> Iterator[None]:
    """Inside, torch.save leaves other threads alone: it holds Python's lock while it computes the CRC-32 of a tensor.

    The files have none then, which torch.load does not ask for; they have a SHA-256 in the manifest.
    """
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(True)  # torch's default


def write_json(path: Path, content: Any) -> Written:
    """JSON to `path`, on the disk when this returns."""
    return write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, text: str) -> Written:
    """Text to `path`, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        counting = _Counting(file)
        counting.write(text.encode())
        flush_to_disk(file)
    return Written(path, counting.size, counting.digest.hexdigest())


def read_tensors(path: Path) -> Any:
    """torch.load without running code, mapped into memory so that only what is used is read.

    Files from before torch 1.6, which are no archives, are read whole. Raises RunError naming the file if it is damaged
    or holds anything but tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(_allowed()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_archive(path))
    except _UNREADABLE as error:
        raise RunError.of(
            f"the file cannot be read: {_reason(error)}",
            location=str(path),
            hint="it is damaged or not a checkpoint; load another iteration with --iteration N",
        ) from error


def _reason(error: Exception) -> str:
    """The line of torch's message that names the cause; what is before it is advice about torch.load."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if len(lines) > 1 and lines[0].startswith(_ADVICE):
        return "\n".join(lines[1:]).rpartition(_CAUSE)[2].strip().partition("\n")[0]
    return lines[0]


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


class Foreign:
    """Stands for an object of another program's class, whose attributes are kept and whose code is not."""


def _allowed() -> list[Any]:
    """What a checkpoint may hold beside tensors: numpy's random state, and DeepSpeed's loss scale without its code."""
    names = ("LossScaler", "DynamicLossScaler")
    foreign: list[Any] = [(Foreign, f"deepspeed.runtime.fp16.loss_scaler.{name}") for name in names]
    reconstruct = numpy.zeros(0).__reduce__()[0]
    plain = [numpy.ndarray, numpy.dtype, *(type(numpy.dtype(name)) for name in ("u4", "i4", "i8", "f4", "f8"))]
    old = [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    return [*plain, *old, (codecs.encode, "_codecs.encode"), *foreign]


def read_json(path: Path) -> Any:
    """The content of a JSON file; RunError naming it if it is not there or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError.of(f"the file cannot be read: {error}", location=str(path)) from error


def read_object(path: Path, hint: str | None = None) -> dict[str, Any]:
    """The object in a JSON file; ConfigError with the hint where it holds anything else, RunError as `read_json`."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ConfigError.of("this is no object", location=str(path), hint=hint)
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    accumulated = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            accumulated.update(chunk)
    return accumulated.hexdigest()
