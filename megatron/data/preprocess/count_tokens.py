"""How much text a token stands for: the bridge from nats a token to bits a byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from megatron.data.preprocess.encode import Counted, InvalidDocument, SkippedCounts, SkippedRecord, records_of, text_of
from megatron.data.preprocess.reader import read_blocks
from megatron.data.preprocess.text_files import TextFile


def read_texts(files: Iterable[TextFile], key: str = "text", skipped: SkippedCounts | None = None) -> Iterator[str]:
    """The text of every document of some files. Lines that hold none are left out and counted in `skipped`."""
    skipped = SkippedCounts() if skipped is None else skipped
    base = 0
    for block in read_blocks(files):
        base = 0 if block.begins else base
        found: list[SkippedRecord] = []
        counted = Counted()
        for number, record in records_of(block, (key,), found, counted):
            try:
                yield text_of(record, key)
            except InvalidDocument as error:
                found.append(SkippedRecord(block.name, number, error.reason, error.detail))
        for each in found:
            skipped.add(replace(each, number=each.number and each.number + base))
        base += counted.records


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A mean loss [nats/token] as bits a byte of text [bits/byte], which can be compared between tokenizers."""
    return nats_per_token / math.log(2) / bytes_per_token
