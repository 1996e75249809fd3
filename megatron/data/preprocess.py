"""Text files to token files: read blocks, encode them, write them in order.

The bytes written depend on the text, the tokenizer and the keys alone: not on the number of workers, nor on how the
text is cut into blocks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron.data.card import DatasetCard
from megatron.data.encode import EncodedBlock, Encoder, Encoding, Skipped, mended
from megatron.data.indexed import dtype_for_vocabulary
from megatron.data.text_files import TextFile, read_blocks
from megatron.data.workers import encode_blocks
from megatron.data.writer import DatasetWriter
from megatron.errors import ConfigError, Mistake, RunError


@dataclass(frozen=True)
class Progress:
    """How far the work is. content_bytes: text files' content so far [bytes]. fraction: of the input that is done, in
    [0, 1]. seconds: since the start.
    """

    documents: int
    tokens: int
    content_bytes: int
    fraction: float
    seconds: float


@dataclass(frozen=True)
class Written:
    """One pair of token files. prefix: their path without .bin and .idx."""

    key: str
    prefix: str
    card: DatasetCard


@dataclass(frozen=True)
class Result:
    """What was done. empty: documents without text, which were left out. seconds: wall time [s]."""

    outputs: tuple[Written, ...]
    skipped: Skipped
    empty: int
    content_bytes: int
    seconds: float


@dataclass
class _Running:
    """Counts that grow while the work goes on."""

    started: float
    content_bytes: int = 0
    empty: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    text_bytes: list[int] = field(default_factory=list)


def output_prefix_of(prefix: str, key: str) -> str:
    """`<prefix>_<key>_document`, the path of a key's token files without .bin and .idx."""
    return f"{prefix}_{key}_document"


def preprocess(
    files: Sequence[TextFile],
    *,
    output_prefix: str,
    tokenizer: Encoding,
    tokenizer_type: str,
    keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    repair: bool = False,
    workers: int = 1,
    strict: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Result:
    """Writes `<output_prefix>_<key>_document.bin` and `.idx`, and what is known about them as `.json`, for each key.

    A document is a line of a JSON lines file or a whole text file. It is left out when one of its keys is empty; a line
    that is not JSON, lacks a key or is not text is skipped and counted, or, with strict, ends the work.
    Raises ConfigError for impossible wishes; RunError for damaged input, a full disk, a line that strict refuses, and
    when no document is left. Nothing appears under a final name unless all of it is written.
    """
    _check(keys, workers, output_prefix, repair)
    dtype = dtype_for_vocabulary(tokenizer.vocab_size)
    encoder = Encoder(tokenizer, tuple(keys), dtype, append_eod, repair)
    running = _Running(time.monotonic(), text_bytes=[0] * len(keys))
    eod = tokenizer.eod if append_eod else None
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(DatasetWriter(output_prefix_of(output_prefix, key), dtype)) for key in keys]
        encoded = stack.enter_context(contextlib.closing(encode_blocks(encoder, read_blocks(files), workers)))
        total_bytes = sum(file.bytes for file in files)
        for block in encoded:
            _take(block, writers, running, strict=strict)
            elapsed = time.monotonic() - running.started
            report(
                Progress(
                    writers[0].documents,
                    sum(writer.tokens for writer in writers),
                    running.content_bytes,
                    block.read_bytes / total_bytes,
                    elapsed,
                )
            )
        _refuse_nothing(writers[0], files, running)
        for writer, text_bytes in zip(writers, running.text_bytes, strict=True):
            writer.card = DatasetCard(
                writer.documents, writer.tokens, text_bytes, tokenizer_type, tokenizer.vocab_size, eod
            )
    outputs = tuple(
        Written(key, writer.prefix, writer.card)
        for key, writer in zip(keys, writers, strict=True)
        if writer.card is not None
    )
    return Result(outputs, running.skipped, running.empty, running.content_bytes, time.monotonic() - running.started)


def _check(keys: Sequence[str], workers: int, output_prefix: str, repair: bool) -> None:
    mistakes = []
    if not keys or len(set(keys)) != len(keys):
        mistakes.append(Mistake("each key is named once, and one at least", key="jsonl_keys", value=list(keys)))
    if any("/" in key for key in keys):
        mistakes.append(Mistake("a key becomes part of a file name", key="jsonl_keys", value=list(keys)))
    if workers < 1:
        mistakes.append(Mistake("at least one process must work", key="workers", value=workers))
    if not output_prefix or output_prefix.endswith("/"):
        what = "this is a directory, and file names are made of what stands here"
        remedy = "add a name, such as data/train"
        mistakes.append(Mistake(what, key="output_prefix", value=output_prefix, remedy=remedy))
    ConfigError.raise_any(mistakes)
    if repair:
        mended("")  # refuses now, rather than in a worker, when the package is missing


def _take(block: EncodedBlock, writers: Sequence[DatasetWriter], running: _Running, *, strict: bool) -> None:
    """Writes a block and counts it."""
    if strict and block.skipped.total:
        raise RunError.of(
            block.skipped.examples[0],
            remedy="mend the line, or leave out --strict to skip such lines and count them",
        )
    for number, (writer, text) in enumerate(zip(writers, block.texts, strict=True)):
        writer.add_documents(text.tokens, text.sizes)
        running.text_bytes[number] += text.text_bytes
    running.skipped.merge(block.skipped)
    running.empty += block.empty
    running.content_bytes += block.content_bytes


def _refuse_nothing(writer: DatasetWriter, files: Sequence[TextFile], running: _Running) -> None:
    if writer.documents:
        return
    told = [f"there is no document in the {len(files)} input files"]
    if running.skipped.total:
        told += [str(running.skipped), *running.skipped.examples[:1]]
    if running.empty:
        told.append(f"{running.empty:,} documents have no text")
    raise RunError.of("; ".join(told), remedy="name the keys that hold the text with --jsonl-keys")
