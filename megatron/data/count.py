"""How much text a token stands for: the bridge from nats a token to bits a byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from megatron.data.blocks import read_blocks
from megatron.data.encode import Counted, Encoding, NotADocument, Skipped, SkippedRecord, records_of, text_of
from megatron.data.text_files import TextFile

BATCH = 256  # documents that are encoded at once


@dataclass(frozen=True)
class TextCount:
    """A set of documents in bytes of UTF-8 and in tokens. tokens: with one end of document each where asked for."""

    documents: int
    text_bytes: int
    tokens: int

    @property
    def bytes_per_token(self) -> float:
        """Text bytes that one token stands for on average."""
        return self.text_bytes / self.tokens if self.tokens else 0.0


def read_texts(files: Iterable[TextFile], key: str = "text", skipped: Skipped | None = None) -> Iterator[str]:
    """The text of every document of some files. Lines that hold none are left out and counted in `skipped`."""
    skipped = Skipped() if skipped is None else skipped
    base = 0
    for block in read_blocks(files):
        base = 0 if block.begins else base
        found: list[SkippedRecord] = []
        counted = Counted()
        for number, record in records_of(block, (key,), found, counted):
            try:
                yield text_of(record, key)
            except NotADocument as fault:
                found.append(SkippedRecord(block.name, number, fault.reason, fault.detail))
        for each in found:
            skipped.add(replace(each, number=each.number and each.number + base))
        base += counted.records


def count_texts(texts: Iterable[str], tokenizer: Encoding, *, append_eod: bool = True) -> TextCount:
    """Counts documents, bytes and tokens. append_eod: count an end of document after each text that is not empty."""
    documents = text_bytes = tokens = 0
    remaining = iter(texts)
    while batch := list(islice(remaining, BATCH)):
        full = [text for text in batch if text]
        documents += len(full)
        text_bytes += sum(len(text.encode("utf-8")) for text in full)
        tokens += sum(map(len, tokenizer.encode_arrays(full))) + (len(full) if append_eod else 0)
    return TextCount(documents, text_bytes, tokens)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A mean loss [nats/token] as bits a byte of text [bits/byte], which can be compared between tokenizers."""
    return nats_per_token / math.log(2) / bytes_per_token
