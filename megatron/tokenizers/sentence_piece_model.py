"""The content of a sentencepiece .model: pieces with scores and kinds, the algorithm and the normalisation.

Such a file is a protocol buffer, of which the few fields that matter are read.

Source: sentencepiece_model.proto of https://github.com/google/sentencepiece (fields by number).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

UNKNOWN, CONTROL, USER, BYTE = 2, 3, 4, 6
"""Kinds of pieces: of what cannot be spelt, special tokens, symbols that are never split, and bytes."""
UNIGRAM, BPE = 1, 2
"""Algorithms."""


@dataclass(frozen=True)
class PieceModel:
    """What the file says."""

    pieces: list[tuple[str, float, int]]
    """Text, score and kind of each."""
    algorithm: int
    """UNIGRAM, BPE, or another number."""
    byte_fallback: bool
    """Whether what no piece spells is spelt by its bytes."""
    charsmap: bytes
    """Of the normalisation, compiled."""
    dummy_prefix: bool
    """Whether a blank is put before a text."""
    single_blanks: bool
    """Whether repeated blanks become one, and those around a text none."""


def read_model(content: bytes) -> PieceModel:
    """Reads the content of a .model that the library has accepted."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    rules: dict[int, int | bytes] = {}
    for field, value in _fields(content):
        if not isinstance(value, bytes):
            continue
        if field == 1:
            inner = dict(_fields(value))
            score = struct.unpack("<f", bytes(inner[2]))[0] if isinstance(inner.get(2), bytes) else 0.0
            kind = inner.get(3, 1)
            pieces.append((bytes(inner[1]).decode("utf-8"), score, int(kind) if isinstance(kind, int) else 1))  # type: ignore[arg-type]
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            rules = dict(_fields(value))
    charsmap = rules.get(2, b"")
    return PieceModel(
        pieces,
        algorithm=int(trainer.get(3, UNIGRAM)),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        dummy_prefix=bool(rules.get(3, 1)),
        single_blanks=bool(rules.get(4, 1)),
    )


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: whole numbers as int, everything else as its bytes."""
    offset = 0
    while offset < len(content):
        tag, offset = _number(content, offset)
        kind = tag & 7
        if kind == 0:
            value, offset = _number(content, offset)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, offset = _number(content, offset)
        else:
            size = {1: 8, 5: 4}[kind]
        yield tag >> 3, content[offset : offset + size]
        offset += size


def _number(content: bytes, offset: int) -> tuple[int, int]:
    """A number in base 128, least part first, and where the next field begins."""
    value = shift = 0
    while True:
        byte = content[offset]
        offset += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, offset
