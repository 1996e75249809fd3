"""Blocks of text files to token ids: the part of preprocessing that runs in every worker."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np

from megatron.data.text_files import Block
from megatron.errors import ConfigError

EXAMPLES = 5  # skipped lines of a block that are described; the others are counted


class Encoding(Protocol):
    """What preprocessing needs of a tokenizer; it travels to the workers by pickle."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod(self) -> int: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


@dataclass
class Skipped:
    """Lines that gave no document. counts: how many for each reason. examples: "file:line: reason" of the first."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, where: str, detail: str = "") -> None:
        """One more line. where: `file:line`."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{where}: {reason}" + (f" ({detail})" if detail else ""))

    def merge(self, other: Skipped) -> None:
        """Adds what was found later."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
        self.examples += other.examples[: EXAMPLES - len(self.examples)]

    @property
    def total(self) -> int:
        """All skipped lines."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.counts.items()))
        return f"{self.total:,} lines skipped: {reasons}"


@dataclass(frozen=True)
class EncodedText:
    """The documents of one key of a block: all their tokens, the length of each, and the UTF-8 bytes of their text."""

    tokens: np.ndarray
    sizes: np.ndarray
    text_bytes: int


@dataclass(frozen=True)
class EncodedBlock:
    """What a block became. texts: one for each key, with as many documents each. empty: documents without text.

    content_bytes and read_bytes: of the block, for the progress line.
    """

    texts: tuple[EncodedText, ...]
    skipped: Skipped
    empty: int
    content_bytes: int
    read_bytes: int

    @property
    def documents(self) -> int:
        """Documents of each key."""
        return len(self.texts[0].sizes)


@dataclass(frozen=True)
class Encoder:
    """Turns blocks into token ids.

    keys: the fields of a JSON line that hold text; a line must have them all. append_eod: end each document with the
    tokenizer's end-of-document id. repair: mend broken Unicode with ftfy first.
    """

    tokenizer: Encoding
    keys: tuple[str, ...]
    dtype: np.dtype
    append_eod: bool = False
    repair: bool = False

    def encode(self, block: Block) -> EncodedBlock:
        """The token ids of every document of the block, in order."""
        skipped = Skipped()
        empty = 0
        columns: list[list[str]] = [[] for _ in self.keys]
        for texts in documents_of(block, self.keys, skipped):
            if self.repair:
                texts = [mended(text) for text in texts]
            if all(texts):
                for column, text in zip(columns, texts, strict=True):
                    column.append(text)
            else:
                empty += 1
        encoded = tuple(self._encode_texts(column) for column in columns)
        return EncodedBlock(encoded, skipped, empty, len(block.content), block.read_bytes)

    def _encode_texts(self, texts: list[str]) -> EncodedText:
        ids = self.tokenizer.encode_batch(texts)
        if self.append_eod:
            for document in ids:
                document.append(self.tokenizer.eod)
        sizes = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.fromiter(chain.from_iterable(ids), self.dtype, int(sizes.sum()))
        return EncodedText(tokens, sizes, sum(len(text.encode("utf-8")) for text in texts))


def documents_of(block: Block, keys: Sequence[str], skipped: Skipped) -> Iterator[list[str]]:
    """The texts of each document of a block, one for each key. Lines that give none are put into `skipped`."""
    if block.file.whole:
        try:
            yield [block.content.decode("utf-8")] * len(keys)
        except UnicodeDecodeError as fault:
            skipped.add("not UTF-8", str(block.file.path), str(fault))
        return
    for number, line in enumerate(block.content.split(b"\n"), start=block.first_line):
        if line.strip():
            texts = _texts_of(line, keys, skipped, block, number)
            if texts is not None:
                yield texts


def _texts_of(line: bytes, keys: Sequence[str], skipped: Skipped, block: Block, number: int) -> list[str] | None:
    where = f"{block.file.path}:{number}"
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as fault:
        skipped.add("not UTF-8", where, f"byte {fault.start} of the line")
        return None
    except (ValueError, RecursionError) as fault:
        skipped.add("not JSON", where, str(fault))
        return None
    if not isinstance(record, dict):
        skipped.add("not a JSON object", where)
        return None
    texts = []
    for key in keys:
        text = record.get(key)
        if key not in record:
            has = ", ".join(sorted(map(repr, record))[:8]) or "none"
            skipped.add(f"without the key {key!r}", where, f"its keys: {has}")
            return None
        if not isinstance(text, str):
            skipped.add(f"whose {key!r} is not text", where, f"it is {type(text).__name__}")
            return None
        if not _is_unicode(text):
            skipped.add(f"whose {key!r} holds half a surrogate pair", where)
            return None
        texts.append(text)
    return texts


def _is_unicode(text: str) -> bool:
    """Whether the text has a UTF-8 form; JSON may spell single surrogates, which have none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def mended(text: str) -> str:
    """The text with broken Unicode mended. Raises ConfigError when ftfy is not installed."""
    try:
        ftfy = importlib.import_module("ftfy")
    except ModuleNotFoundError as fault:
        raise ConfigError.of(
            "mending Unicode needs the package ftfy, which is not installed", key="ftfy", remedy="pip install ftfy"
        ) from fault
    fixed: str = ftfy.fix_text(text)
    return fixed
