"""Blocks of text files to token ids: the part of preprocessing that runs in every worker.

A block becomes records, one for each document, and a recipe (document_types.py) makes tokens of them. What is no
document is put down with its place and the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from megatron.data.preprocess.reader import TextBlock, parse_lengths
from megatron.data.preprocess.text_files import Kind
from megatron.errors import RunError

_SPACE = 0x20
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # its byte order mark
_LOOKED_AT = 64  # bytes of a line that is no JSON
_JSON_KINDS = {list: "a JSON array", str: "a text", bool: "true or false", int: "a number", float: "a number"}
EXAMPLES = 5  # skipped documents that are described at the end of the work; the sidecar file has them all


class Encoding(Protocol):
    """What preprocessing needs of a tokenizer; it travels to the workers when they are started."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod(self) -> int: ...

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]: ...


@runtime_checkable
class ReadsSpecialTokens(Protocol):
    """A tokenizer that may take special tokens that a text spells for what they are."""

    def encode_with_special_tokens(self, text: str) -> list[int]: ...


class InvalidDocument(Exception):
    """A record that is not a document. reason: the counted category. detail: about this record."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def encode_texts(tokenizer: Encoding, texts: list[str], *, parse_special: bool = False) -> list[np.ndarray]:
    """The ids of each text. parse_special: special tokens that it spells are their ids.

    Raises InvalidDocument where the tokenizer refuses one.
    """
    try:
        if parse_special:
            assert isinstance(tokenizer, ReadsSpecialTokens)
            return [np.array(tokenizer.encode_with_special_tokens(text), np.int32) for text in texts]
        return tokenizer.encode_arrays(texts)
    except RunError as error:
        raise InvalidDocument("that the tokenizer cannot take", str(error)) from error


@dataclass(frozen=True)
class SkippedRecord:
    """A skipped record."""

    name: str
    """Name of the file."""
    number: int
    """Its line or document in the file, from 1; 0 for the entire file."""
    reason: str
    """The counted category."""
    detail: str
    """About this record."""

    def __str__(self) -> str:
        location = f"{self.name}:{self.number}" if self.number else self.name
        return f"{location}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class SkippedCounts:
    """Records that gave no document."""

    counts: dict[str, int] = field(default_factory=dict)
    """How many for each reason."""
    examples: list[str] = field(default_factory=list)
    """The first, in words."""

    def add(self, record: SkippedRecord) -> None:
        """One more."""
        self.counts[record.reason] = self.counts.get(record.reason, 0) + 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(str(record))

    @property
    def total(self) -> int:
        """All skipped records."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.counts.items()))
        return f"{self.total:,} lines or files skipped: {reasons}"


@dataclass(frozen=True)
class EncodedText:
    """The documents of one output of a block."""

    tokens: np.ndarray
    """Of all of them."""
    sizes: np.ndarray
    """Of each item [tokens]."""
    text_bytes: int
    """UTF-8 bytes of their text."""
    items: np.ndarray | None = None
    """Of each document, where documents have several."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Documents with a remark, counted by remark."""


@dataclass(frozen=True)
class EncodedBlock:
    """What a block became."""

    name: str
    """Of the block."""
    begins: bool
    """Of the block."""
    texts: tuple[EncodedText, ...]
    """One for each output."""
    documents: int
    """Of each output."""
    skipped: tuple[SkippedRecord, ...]
    """With numbers counted from the block's first record."""
    empty: int
    """Documents without text."""
    records: int
    """Lines or documents of the block, whatever became of them."""
    content_bytes: int
    """Of the block, for the progress line."""
    read_bytes: int
    """Of the block, for the progress line."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Of its texts."""


class Recipe(Protocol):
    """What becomes of a record. keys: the fields that hold text."""

    @property
    def keys(self) -> tuple[str, ...]: ...

    @property
    def outputs(self) -> tuple[tuple[str, np.dtype[Any]], ...]:
        """Name and dtype of each pair of token files that is written."""
        ...

    def read(self, record: Mapping[str, Any]) -> Any | None:
        """What is needed of a record, or None for a document without text. Raises InvalidDocument."""
        ...

    def encode(self, documents: list[Any]) -> tuple[EncodedText, ...]:
        """The outputs of what `read` gave. Raises InvalidDocument when a document cannot be encoded."""
        ...


@dataclass(frozen=True)
class Encoder:
    """Turns blocks into token ids by a recipe."""

    recipe: Recipe

    def encode(self, block: TextBlock) -> EncodedBlock:
        """The token ids of every document of the block, in order."""
        recipe = self.recipe
        skipped: list[SkippedRecord] = []
        counted = Counted()
        empty = 0
        documents, numbers = [], []
        for number, record in records_of(block, recipe.keys, skipped, counted):
            try:
                document = recipe.read(record)
            except InvalidDocument as error:
                skipped.append(SkippedRecord(block.name, number, error.reason, error.detail))
                continue
            if document is None:
                empty += 1
            else:
                documents.append(document)
                numbers.append(number)
        try:
            texts = recipe.encode(documents)
        except InvalidDocument:
            documents = list(self._one_by_one(block.name, documents, numbers, skipped))
            texts = recipe.encode(documents)
        skipped.sort(key=lambda record: record.number)
        return EncodedBlock(
            block.name,
            block.begins,
            texts,
            len(documents),
            tuple(skipped),
            empty,
            counted.records,
            block.length,
            block.read_bytes,
            _together(text.notes for text in texts),
        )

    def _one_by_one(
        self, name: str, documents: list[Any], numbers: list[int], skipped: list[SkippedRecord]
    ) -> Iterator[Any]:
        """The documents that can be encoded."""
        for document, number in zip(documents, numbers, strict=True):
            try:
                self.recipe.encode([document])
            except InvalidDocument as error:
                skipped.append(SkippedRecord(name, number, error.reason, error.detail))
            else:
                yield document


def _together(notes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in notes:
        for what, count in each.items():
            total[what] = total.get(what, 0) + count
    return total


@dataclass
class Counted:
    """records: lines or documents of a block so far."""

    records: int = 0


def records_of(
    block: TextBlock, keys: Sequence[str], skipped: list[SkippedRecord], counted: Counted
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and record of each document of a block; plain text is a record with that text under every key.

    Args:
        block: Part of a text file.
        keys: Fields that hold text.
        skipped: Gets the records that are no documents.
        counted: Gets the number of records.
    """
    if block.lost is not None:
        skipped.append(SkippedRecord(block.name, 0, *block.lost))
        return
    if block.kind is Kind.LINES:
        content = block.load()
        view = memoryview(content)  # a line may be most of the memory: it is not copied
        start = 0
        while start < len(content):
            counted.records += 1
            end = content.find(b"\n", start)
            end = len(content) if end < 0 else end
            if start < end and not (content[start] <= _SPACE and content[start:end].isspace()):
                record = _json(view[start:end], block.name, counted.records, skipped)
                if record is not None:
                    yield counted.records, record
                    del record
            start = end + 1
        return
    one_file = block.kind is Kind.FILE
    for number, content in enumerate([block.load()] if one_file else parse_lengths(block.load()), 1):
        counted.records = number
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            skipped.append(SkippedRecord(block.name, 0 if one_file else number, "not UTF-8", f"byte {error.start}"))
            continue
        yield 0 if one_file else number, dict.fromkeys(keys, text)


def _json(line: memoryview, name: str, number: int, skipped: list[SkippedRecord]) -> Mapping[str, Any] | None:
    try:
        record = json.loads(str(line, "utf-8"))
    except UnicodeDecodeError as error:
        detail = "it is UTF-16" if bytes(line[:2]) in _UTF16 else f"byte {error.start} of the line"
        skipped.append(SkippedRecord(name, number, "not UTF-8", detail))
        return None
    except (ValueError, RecursionError) as error:
        if _is_utf16(bytes(line[:_LOOKED_AT])):
            skipped.append(SkippedRecord(name, number, "not UTF-8", "it is UTF-16"))
            return None
        skipped.append(SkippedRecord(name, number, "not JSON", str(error)))
        return None
    if not isinstance(record, dict):
        kind = _JSON_KINDS.get(type(record), "null")
        skipped.append(SkippedRecord(name, number, "not a JSON object", f"it is {kind}"))
        return None
    return record


def _is_utf16(start: bytes) -> bool:
    """Whether a line looks like UTF-16 without its mark: about every other byte of Latin text is 0."""
    return len(start) // 4 < start.count(0) < len(start) * 3 // 4


def text_of(record: Mapping[str, Any], key: str) -> str:
    """The text under a key. Raises InvalidDocument."""
    if key not in record:
        has = ", ".join(sorted(map(repr, record))[:8]) or "none"
        raise InvalidDocument(f"without the key {key!r}", f"its keys: {has}")
    text = record[key]
    if not isinstance(text, str):
        raise InvalidDocument(f"whose {key!r} is not text", f"it is {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON may spell single surrogates, which have no UTF-8 form
            raise InvalidDocument(f"whose {key!r} holds half a surrogate pair") from error
    return text
