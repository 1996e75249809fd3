r"""Token files: many documents in one memory-mapped file, with an index of their offsets.

Two files share a prefix. Everything is little endian; the arrays follow each other, without alignment.

`<prefix>.bin`: the token ids of all items, one after another, without a header.

`<prefix>.idx`:
    9 bytes       magic, b"MMIDIDX\x00\x00"
    u64           version, 1
    u8            dtype code: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f32, 7 f64, 8 u16
    u64           I, the number of items
    u64           D, the number of entries of the document index
    i32[I]        length of each item [tokens]
    i64[I]        where each item starts in the .bin [bytes]
    i64[D]        document index: 0, then the number of items after each document

The legacy format (`--dataset-impl lazy` and `cached` write it) has the same .bin and, in 64 bits each:
    8 bytes       magic, b"TNTIDX\x00\x00"
    version, 1; dtype code; bytes of a token; I; I again; D
    I + 1         0, 1, ... I: every item has one dimension
    I + 1         where each item starts in the .bin, and where the last one ends [tokens]
    I, D          length of each item [tokens], and the document index

An item is what was tokenised at once. Everything written here has one item a document, and training counts items.
Megatron-LM, Megatron-Core, GPT-NeoX and datatrove read and write the same two files.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np

from megatron.errors import ConfigError, RunError

IGNORE_INDEX = -100
"""In a file of labels: the token at this position is not to be predicted."""

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, items, document index entries
LEGACY_HEADER = struct.Struct("<8sQQQQQQ")  # magic, version, dtype code, bytes of a token, items, sizes, entries
DTYPES: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {
        1: np.dtype("<u1"),
        2: np.dtype("<i1"),
        3: np.dtype("<i2"),
        4: np.dtype("<i4"),
        5: np.dtype("<i8"),
        6: np.dtype("<f4"),
        7: np.dtype("<f8"),
        8: np.dtype("<u2"),
    }
)

LARGEST_U16_VOCABULARY = 65500


def dtype_for_vocabulary(vocab_size: int) -> np.dtype:
    """The dtype that holds every id: 2 bytes below 65,500 ids (before padding), else 4."""
    return np.dtype("<u2") if vocab_size < LARGEST_U16_VOCABULARY else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """`<prefix>.bin`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """`<prefix>.idx`."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """The documents of `<prefix>.bin` and `<prefix>.idx`, read through memory maps.

    sizes: int32 [items], the length of each item [tokens]. starts: int64 [items], where it starts [bytes].
    document_index: int64. dtype: of a token. legacy: whether the index has the legacy format. key: the configuration
    key that named the prefix, for messages. Raises ConfigError when a file is missing or of another kind, RunError when
    a file is damaged. Opening costs the same whatever the size, but for a legacy index, which is converted; `check`
    reads the whole index.
    """

    def __init__(self, prefix: str | Path, *, key: str | None = None) -> None:
        self.prefix = str(prefix)
        self._key = key
        index = self._map(idx_path(prefix))
        self.legacy = index[: len(LEGACY_MAGIC)] == LEGACY_MAGIC
        if self.legacy:
            self._read_legacy(index)
        else:
            self._read_index(index)
        items = len(self.sizes)
        tokens = self._map(bin_path(prefix))
        self.bin_bytes = len(tokens)
        used = int(self.starts[-1]) + int(self.sizes[-1]) * self.dtype.itemsize if items else 0
        if used != self.bin_bytes:
            self._damaged(
                bin_path(prefix),
                f"the .idx beside it describes {used} bytes and it has {self.bin_bytes}: "
                "it was cut short, or the two files do not belong together",
            )
        self._tokens = np.frombuffer(tokens, self.dtype)

    def __len__(self) -> int:
        """The number of items, which are documents in all files written here."""
        return len(self.sizes)

    def get(self, item: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """The tokens of an item, or `length` of them from `offset` on: a view of the file, [tokens]."""
        size = int(self.sizes[item])
        stop = size if length is None else offset + length
        if not 0 <= offset <= stop <= size:
            raise IndexError(f"tokens {offset} to {stop} of item {item}, which has {size}")
        first = int(self.starts[item]) // self.dtype.itemsize
        return self._tokens[first + offset : first + stop]

    def __getitem__(self, item: int) -> np.ndarray:
        return self.get(item)

    @property
    def tokens(self) -> np.ndarray:
        """Every token of the file, in file order: a view, [tokens]."""
        return self._tokens

    def check(self) -> None:
        """Reads the whole index: lengths, and that every start follows from them. Raises RunError."""
        location = idx_path(self.prefix)
        if len(self) and int(self.sizes.min()) < 0:
            self._damaged(location, f"document {int(self.sizes.argmin())} has a negative length")
        ends = np.cumsum(self.sizes, dtype=np.int64) * self.dtype.itemsize
        wrong = np.flatnonzero(self.starts[1:] != ends[:-1])
        if len(self) and self.starts[0] != 0:
            self._damaged(location, "its first document does not start at byte 0")
        if len(wrong):
            self._damaged(location, f"document {int(wrong[0]) + 1} does not start where the one before it ends")

    def warm_up(self, block: int = 64 << 20) -> None:
        """Reads the .bin once, so that it is in the page cache. block: [bytes] at a time."""
        with bin_path(self.prefix).open("rb", buffering=0) as file:
            while file.read(block):
                pass

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        """Another process opens the files again."""
        return type(self), (self.prefix,)

    def _map(self, path: Path) -> bytes | mmap.mmap:
        try:
            with path.open("rb") as file:
                # An empty file cannot be mapped.
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        except OSError as error:
            raise ConfigError.of(
                f"cannot read the data file {path} ({error.strerror})",
                key=self._key,
                value=self.prefix,
                hint="give the path of the data without .bin or .idx, as tools/preprocess_data.py printed it",
            ) from error

    def _read_index(self, index: bytes | mmap.mmap) -> None:
        path = idx_path(self.prefix)
        if index[: len(MAGIC)] != MAGIC:
            raise ConfigError.of(
                f"{path} is not an index of token data: it starts with {bytes(index[: len(MAGIC)])!r}",
                key=self._key,
                value=self.prefix,
            )
        self._check_header(index, HEADER)
        version, code, items, entries = HEADER.unpack(index[: HEADER.size])[1:]
        self._check_codes(version, code)
        sizes_at = HEADER.size
        starts_at = sizes_at + 4 * items
        documents_at = starts_at + 8 * items
        self._check_length(index, documents_at + 8 * entries, items)
        self.dtype = DTYPES[code]
        self.sizes = np.frombuffer(index, "<i4", items, sizes_at)
        self.starts = np.frombuffer(index, "<i8", items, starts_at)
        self.document_index = np.frombuffer(index, "<i8", entries, documents_at)

    def _read_legacy(self, index: bytes | mmap.mmap) -> None:
        self._check_header(index, LEGACY_HEADER)
        version, code, width, items, sizes, entries = LEGACY_HEADER.unpack(index[: LEGACY_HEADER.size])[1:]
        self._check_codes(version, code)
        self.dtype = DTYPES[code]
        if width != self.dtype.itemsize or sizes != items:
            self._damaged(
                idx_path(self.prefix),
                f"it says {width} bytes a token of {self.dtype.name}, and {sizes} lengths of {items} items",
            )
        starts_at = LEGACY_HEADER.size + 8 * (items + 1)
        sizes_at = starts_at + 8 * (items + 1)
        documents_at = sizes_at + 8 * items
        self._check_length(index, documents_at + 8 * entries, items)
        lengths = np.frombuffer(index, "<i8", items, sizes_at)
        if items and not (int(lengths.min()) >= 0 and int(lengths.max()) <= np.iinfo(np.int32).max):
            self._damaged(idx_path(self.prefix), f"a length is not in [0, {np.iinfo(np.int32).max}]")
        self.sizes = lengths.astype("<i4")
        self.starts = np.frombuffer(index, "<i8", items, starts_at) * width
        self.document_index = np.frombuffer(index, "<i8", entries, documents_at)

    def _check_header(self, index: bytes | mmap.mmap, header: struct.Struct) -> None:
        if len(index) < header.size:
            self._damaged(idx_path(self.prefix), f"its header has {header.size} bytes and the file {len(index)}")

    def _check_codes(self, version: int, code: int) -> None:
        path = idx_path(self.prefix)
        if version != VERSION:
            self._damaged(path, f"it says version {version}, and only version {VERSION} is known")
        if code not in DTYPES:
            self._damaged(path, f"it says dtype code {code}, and the codes are {min(DTYPES)} to {max(DTYPES)}")

    def _check_length(self, index: bytes | mmap.mmap, expected: int, items: int) -> None:
        if len(index) != expected:
            what = f"it should have {expected} bytes for its {items} documents and has {len(index)}"
            self._damaged(idx_path(self.prefix), what)

    def _damaged(self, path: Path, what: str) -> NoReturn:
        raise RunError.of(
            f"the data file is damaged: {what}",
            location=str(path),
            hint="copy the pair again, or write it again with tools/preprocess_data.py",
        )
