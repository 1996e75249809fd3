"""Writing files that are either whole or not there, and reading them without running code.

Everything is written, flushed and fsynced; names are given by rename, which the file system does at once. Reading
goes through torch.load(weights_only=True), which refuses a pickle that would run anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from megatron.errors import RunError

_CHUNK = 1 << 20


def write_tensors(path: Path, content: Any) -> None:
    """torch.save to `path`, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        torch.save(content, file)
        _sync(file)


def write_json(path: Path, content: Any) -> None:
    """JSON to `path`, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        _sync(file)


def replace_text(path: Path, text: str) -> None:
    """Puts a small text under a name at once: readers see the old text or the new one, never a part."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        _sync(file)
    os.replace(beside, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_tensors(path: Path) -> Any:
    """torch.load without running code, mapped into memory so that only what is used is read.

    Raises RunError naming the file if it is damaged or holds anything but tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError.of(
            f"the file cannot be read: {first_line}",
            where=str(path),
            remedy="it is damaged or not a checkpoint; load another iteration with --iteration N",
        ) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file; RunError naming it if it is not there or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError.of(f"the file cannot be read: {error}", where=str(path)) from error


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    accumulated = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            accumulated.update(chunk)
    return accumulated.hexdigest()


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
