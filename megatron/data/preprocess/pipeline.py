"""Text files to token files: read blocks, encode them, write them in order.

The bytes written depend on the text, the tokenizer and the recipe alone: not on the number of workers, nor on how the
text is cut into blocks, nor on whether the work was interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from megatron.data.indexed.metadata import DatasetCard
from megatron.data.indexed.writer import DatasetWriter
from megatron.data.preprocess.encode import EncodedBlock, Encoder, InvalidDocument, Recipe, SkippedCounts
from megatron.data.preprocess.input_shard import Shard, shard_blocks
from megatron.data.preprocess.reader import EMPTY_FILE
from megatron.data.preprocess.resume_state import Journal, PreprocessCounts, SkippedFile, task_of
from megatron.data.preprocess.text_files import TextFile
from megatron.data.preprocess.workers import WorkerKilled, encode_blocks
from megatron.errors import ConfigError, ConfigIssue, RunError
from megatron.tokenizer_info import TokenizerInfo

LEGACY = np.dtype("<i4")  # the legacy format's type of a token, whatever the vocabulary
MARK_INTERVAL = 5.0  # seconds between two states that are kept

_KEYS = "name the keys that hold the text with --jsonl-keys"
_REMEDIES = {
    "not JSON": "one JSON object a line is read; `jq -c .` makes such lines of objects that span several, and "
    "`jq -c '.[]'` of an array",
    "not a JSON object": "one JSON object a line is read; `jq -c '.[]'` makes such lines of a JSON array",
    "not UTF-8": "make it UTF-8, as `iconv -t UTF-8 -f UTF-16` does of UTF-16",
    "damaged": "fetch the file again, or make it again",
    "empty": "name files that hold text",
    "that the chat template cannot take": "change the conversations, give a folder whose template takes "
    "them or says by {% generation %} what is learnt, or train on last answers with --only-last",
    "without the key 'role'": "each turn of a conversation has a 'role' and a 'content'; rename what yours has",
    "without the key 'content'": "a turn has a 'content', or 'tool_calls' in its place; rename what yours has",
    "whose 'content' is not text": "a 'content' is a text or a list of parts that are texts; it may be null beside "
    "'tool_calls' alone",
    "with a part of a content that is no text": "leave these conversations out, or take images and the like from them",
    "whose 'tools'": "it is a list of JSON schemas, or one as a JSON text; rename a field that means something else",
    "whose 'documents'": "it is a list of objects for the template; rename a field that means something else",
    "whose 'chat_template_kwargs'": "it is an object of variables of the template, without what the line says itself",
    "not read": "name members of the archive .jsonl or .txt",
}


@dataclass(frozen=True)
class PreprocessProgress:
    """How far the work is."""

    documents: int
    """Documents that are written."""
    tokens: int
    """Tokens that are written."""
    content_bytes: int
    """Text files' content so far [bytes]."""
    fraction: float
    """Of the input that is done, in [0, 1]."""
    seconds: float
    """Since the start."""


@dataclass(frozen=True)
class WrittenOutput:
    """One pair of token files."""

    name: str
    """Name of the output."""
    prefix: str
    """Their path without .bin and .idx."""
    card: DatasetCard
    """Its metadata."""


@dataclass(frozen=True)
class Result:
    """What was done."""

    outputs: tuple[WrittenOutput, ...]
    """The written files."""
    skipped: SkippedCounts
    """Counts of skipped records."""
    empty: int
    """Documents without text, which were left out."""
    content_bytes: int
    """Bytes of text that were read."""
    seconds: float
    """Wall time [s], of which `starting` passed before the first block came back."""
    starting: float
    """Time until the first block came back [s]."""
    sidecar: str | None
    """The list of what was skipped, or None."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Documents of which with a remark, counted by remark."""


def preprocess(
    files: Sequence[TextFile],
    recipe: Recipe,
    *,
    output_prefix: str,
    facts: TokenizerInfo,
    workers: int = 1,
    strict: bool = False,
    resume: bool = False,
    shard: Shard | None = None,
    legacy: bool = False,
    mark_interval: float = MARK_INTERVAL,
    report: Callable[[PreprocessProgress], None] = lambda progress: None,
) -> Result:
    """Writes `<output_prefix>_<output>.bin` and `.idx`, and what is known about them as `.json`, for each output of the
    recipe; and `<output_prefix>_skipped.jsonl` with what gave no document, if anything.

    Raises ConfigError for options that contradict each other; RunError for damaged input, a full disk, a line that
    strict refuses, and when no document is left. Nothing appears under a final name unless all of it is written.

    Args:
        files: The input files.
        recipe: Turns a record into tokens.
        output_prefix: Prefix of the output files.
        facts: The tokenizer, for the metadata.
        workers: Worker processes.
        strict: What gives no document ends the work.
        resume: Go on where an interrupted work stopped.
        shard: This machine's part.
        legacy: Write the legacy format, with 4 bytes a token.
        mark_interval: [s] between two saved states.
        report: Called with the progress.
    """
    shard = shard or Shard()
    output_prefix = _checked(recipe, workers, output_prefix, shard)
    journal = Journal(output_prefix, task_of(files, _output_fingerprint(recipe, facts, shard) | {"legacy": legacy}))
    resumed = journal.read() if resume else None
    counts = PreprocessCounts(len(recipe.outputs)) if resumed is None else resumed[0]
    marks = [None] * len(recipe.outputs) if resumed is None else resumed[1]
    work = _Work(counts, journal, mark_interval, strict, report)
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                DatasetWriter(f"{output_prefix}_{name}", LEGACY if legacy else dtype, legacy=legacy, mark=mark)
            )
            for (name, dtype), mark in zip(recipe.outputs, marks, strict=True)
        ]
        if resumed is None:
            journal.remove()
        sidecar = stack.enter_context(SkippedFile(output_prefix, counts.sidecar_bytes))
        blocks = islice(shard_blocks(files, shard), counts.blocks, None)
        encoded = stack.enter_context(contextlib.closing(encode_blocks(Encoder(recipe), blocks, workers)))
        total = len(shard.part(sum(file.bytes for file in files)))
        try:
            for block in encoded:
                work.take(block, writers, sidecar, total)
            if shard.count == 1:
                _refuse_nothing(writers[0], files, counts, keys=getattr(recipe, "keys", ()))
        except BaseException as error:
            # A line that is refused, a full disk or an interrupt: what is done can be gone on with.
            keep = resume or isinstance(error, (KeyboardInterrupt, WorkerKilled))
            for writer in writers:
                writer.keep = keep
            sidecar.keep = keep
            if not keep:
                journal.remove()
            raise
        for writer, text_bytes in zip(writers, counts.text_bytes, strict=True):
            writer.card = _metadata(writer, text_bytes, facts)
    journal.remove()
    outputs = tuple(
        WrittenOutput(name, writer.prefix, writer.card)
        for (name, _), writer in zip(recipe.outputs, writers, strict=True)
        if writer.card is not None
    )
    skipped_path = str(sidecar.path) if counts.skipped.total else None
    starting = work.starting or 0.0
    return Result(
        outputs, counts.skipped, counts.empty, work.content_bytes, work.seconds, starting, skipped_path, counts.notes
    )


def _metadata(writer: DatasetWriter, text_bytes: int, facts: TokenizerInfo) -> DatasetCard:
    return DatasetCard(
        writer.documents,
        writer.tokens,
        text_bytes,
        facts.kind,
        facts.vocab_size,
        facts.eod,
        facts.fingerprint,
    )


class _Work:
    """Takes blocks in order, writes and counts them, and keeps a state now and then."""

    def __init__(
        self,
        counts: PreprocessCounts,
        journal: Journal,
        interval: float,
        strict: bool,
        report: Callable[[PreprocessProgress], None],
    ) -> None:
        self._counts = counts
        self._journal = journal
        self._interval = interval
        self._strict = strict
        self._report = report
        self._started = time.monotonic()
        self._saved_at = self._started
        self._before = counts.content_bytes
        self.starting: float | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def content_bytes(self) -> int:
        """Read by this attempt."""
        return self._counts.content_bytes - self._before

    def take(self, block: EncodedBlock, writers: Sequence[DatasetWriter], sidecar: SkippedFile, total: int) -> None:
        """Writes a block."""
        counts = self._counts
        self.starting = self.seconds if self.starting is None else self.starting
        if block.name != counts.record_name or block.begins:
            counts.record_name, counts.record_base = block.name, 0
        for record in block.skipped:
            placed = replace(record, number=record.number and record.number + counts.record_base)
            if self._strict and record.reason != EMPTY_FILE[0]:
                raise RunError.of(
                    str(placed), hint="fix it, or let --on-error skip leave such lines out and count them"
                )
            counts.skipped.add(placed)
            sidecar.add(placed)
        for number, (writer, text) in enumerate(zip(writers, block.texts, strict=True)):
            writer.add_documents(text.tokens, text.sizes, text.items)
            counts.text_bytes[number] += text.text_bytes
        counts.record_base += block.records
        counts.empty += block.empty
        for what, count in block.notes.items():
            counts.notes[what] = counts.notes.get(what, 0) + count
        counts.content_bytes += block.content_bytes
        counts.blocks += 1
        if time.monotonic() - self._saved_at >= self._interval:
            counts.sidecar_bytes = sidecar.mark()
            self._journal.write(counts, [writer.mark() for writer in writers])
            self._saved_at = time.monotonic()
        self._report(
            PreprocessProgress(
                writers[0].documents,
                sum(writer.tokens for writer in writers),
                self.content_bytes,
                min(block.read_bytes / max(total, 1), 1.0),
                self.seconds,
            )
        )


def _checked(recipe: Recipe, workers: int, output_prefix: str, shard: Shard) -> str:
    issues = []
    keys = recipe.keys
    if not keys or len(set(keys)) != len(keys):
        issues.append(ConfigIssue("each key is named once, and one at least", key="jsonl_keys", value=list(keys)))
    if any("/" in key for key in keys):
        issues.append(ConfigIssue("a key becomes part of a file name", key="jsonl_keys", value=list(keys)))
    if workers < 1:
        issues.append(ConfigIssue("at least one process must work", key="workers", value=workers))
    if not output_prefix or output_prefix.endswith("/"):
        what = "this is a directory, and file names are made of what stands here"
        hint = "add a name, such as data/train"
        issues.append(ConfigIssue(what, key="output_prefix", value=output_prefix, hint=hint))
    ConfigError.raise_any(issues)
    with contextlib.suppress(InvalidDocument):
        recipe.read(dict.fromkeys(keys, ""))  # refuses now, rather than in a worker, when a package is missing
    return shard.prefix(output_prefix)


def _output_fingerprint(recipe: Recipe, facts: TokenizerInfo, shard: Shard) -> dict[str, object]:
    """Everything beside the input that decides the output. The tokenizer by what it makes of a text."""
    fields = {name: value for name, value in vars(recipe).items() if name not in {"tokenizer", "template"}}
    probe = ["The quick brown fox, 12345 naïve 東京 \n\n  <|endoftext|>"]
    tokenizer = getattr(recipe, "tokenizer", None)
    ids = tokenizer.encode_arrays(probe)[0].tolist() if tokenizer is not None else []
    return {
        "recipe": [type(recipe).__name__, repr(fields)],
        "tokenizer": [repr(facts), hashlib.sha256(repr(ids).encode()).hexdigest()],
        "shard": repr(shard),
    }


def _refuse_nothing(
    writer: DatasetWriter, files: Sequence[TextFile], counts: PreprocessCounts, keys: Sequence[str]
) -> None:
    if writer.documents:
        return
    messages = [f"there is no document in the {len(files)} input files"]
    if counts.skipped.total:
        messages += [str(counts.skipped), *counts.skipped.examples[:1]]
    if counts.empty:
        under = f" under one of {', '.join(keys)}" if len(keys) > 1 else ""
        messages.append(f"{counts.empty:,} documents have no text{under}")
    most = max(counts.skipped.counts, key=counts.skipped.counts.__getitem__, default="")
    hint = next((hint for start, hint in _REMEDIES.items() if most.startswith(start)), _KEYS)
    raise RunError.of("; ".join(messages), hint=hint)
