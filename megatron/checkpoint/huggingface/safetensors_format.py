"""The safetensors format, read and written a tensor at a time.

    8 bytes     length of the header, little endian
    header      JSON: name -> {"dtype", "shape", "data_offsets": [start, stop]}, padded with spaces to 8 bytes
    data        the tensors back to back, little endian, C order

Nothing here holds more than one tensor: the writer knows the shapes beforehand, the reader maps the file into memory.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron.atomic import flush_to_disk
from megatron.errors import RunError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FETCH = "fetch the file again"
_POINTER = b"version https://git-lfs"
_MOST_HEADER = 100 << 20  # bytes; a longer one is no header


@dataclass(frozen=True)
class Promise:
    """A tensor that will be written: its facts now, its values when its turn comes."""

    name: str
    """Name of the tensor."""
    shape: tuple[int, ...]
    """Its shape."""
    dtype: torch.dtype
    """Its number format."""
    make: Callable[[], Tensor]
    """Computes its values."""

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize


def write(path: Path, tensors: Iterable[Promise], metadata: Mapping[str, str]) -> None:
    """Writes the promised tensors in order, each made when it is written; on the disk when this returns."""
    promised = list(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for each in promised:
        offsets = [offset, offset + each.size]
        header[each.name] = {"dtype": _NAMES[each.dtype], "shape": list(each.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for each in promised:
            _write_values(file, each)
        flush_to_disk(file)


def _write_values(file: BinaryIO, promise: Promise) -> None:
    tensor = promise.make()
    assert tuple(tensor.shape) == promise.shape, promise.name
    values = narrowed(promise.name, tensor, promise.dtype).contiguous().reshape(-1)
    file.write(values.view(torch.uint8).numpy().data)


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in that type. RunError naming it where a value is beyond the largest of the type."""
    made = tensor.to(dtype)
    if dtype.is_floating_point and dtype.itemsize < tensor.dtype.itemsize and tensor.numel():
        low, high = tensor.aminmax()
        most = torch.finfo(dtype).max
        lost = None if -most <= low and high <= most else made.isinf() & tensor.isfinite()
        if lost is not None and lost.any():
            largest = tensor[lost].abs().max().item()
            raise RunError.of(
                f"tensor {name} has values up to {largest:g}, and {most:g} is the largest of "
                f"{str(dtype).removeprefix('torch.')}",
                hint="choose another precision",
            )
    return made


class Reader:
    """One file, mapped into memory; tensors share the mapping and must not be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if self._map[: len(_POINTER)] == _POINTER:
                raise ValueError("git-lfs keeps the file elsewhere, and this names it")
            length = int.from_bytes(self._map[:8], "little")
            if length > min(len(self._map), _MOST_HEADER):
                raise ValueError("the header is longer than the file")
            self._entries = json.loads(self._map[8 : 8 + length])
            self._entries.pop("__metadata__", None)
            self._start = 8 + length
            end = max((entry["data_offsets"][1] for entry in self._entries.values()), default=0)
            if self._start + end != len(self._map):
                raise ValueError(f"{len(self._map)} bytes where the header promises {self._start + end}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"this is not a whole safetensors file: {error}"
            raise RunError.of(message, location=str(path), hint=f"{FETCH} (git lfs pull, hf download)") from error

    def names(self) -> list[str]:
        """The names of the tensors, in the order of the file."""
        return list(self._entries)

    def tensor(self, name: str) -> Tensor:
        """One tensor. RunError if its entry makes no sense."""
        entry = self._entries[name]
        start, stop = entry["data_offsets"]
        dtype, shape = DTYPES.get(entry["dtype"]), entry["shape"]
        if dtype is None or stop - start != prod(shape) * dtype.itemsize:
            message = f"tensor {name} has {entry}, which cannot be read"
            raise RunError.of(message, location=str(self.path), hint=f"only {', '.join(DTYPES)} are read, each whole")
        if start == stop:
            return torch.empty(shape, dtype=dtype)
        values = torch.frombuffer(self._map, dtype=torch.uint8, count=stop - start, offset=self._start + start)
        return _view(values, dtype).view(shape)


def _view(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; copied where they do not be at a multiple of the number's size."""
    aligned = values.storage_offset() % dtype.itemsize == 0 and values.data_ptr() % dtype.itemsize == 0
    return (values if aligned else values.clone()).view(dtype)
