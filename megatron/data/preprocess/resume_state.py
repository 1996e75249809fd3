"""Resume state of preprocessing: an interrupted job continues and ends with the same bytes.

`<output prefix>_preprocess.journal` is replaced atomically, after the data that it counts was synced. It belongs to
one task: the same input files, tokenizer and options. The sidecar `<output prefix>_skipped.jsonl` lists every line that
gave no document.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron.atomic import flush_to_disk, write_atomic
from megatron.data.indexed.writer import Mark, partial
from megatron.data.preprocess.encode import SkippedCounts, SkippedRecord
from megatron.data.preprocess.text_files import TextFile
from megatron.errors import ConfigError, RunError


@dataclass
class PreprocessCounts:
    """Progress counters."""

    outputs: int
    """Number of outputs."""
    blocks: int = 0
    """That are done."""
    content_bytes: int = 0
    """Bytes of text that were read."""
    empty: int = 0
    """Documents without text."""
    record_name: str = ""
    """The file that is being read and its records in the blocks that are done."""
    record_base: int = 0
    """See `record_name`."""
    sidecar_bytes: int = 0
    """Of the list of skipped ones."""
    skipped: SkippedCounts = field(default_factory=SkippedCounts)
    """Counts of skipped records."""
    text_bytes: list[int] = field(default_factory=list)
    """Of each output."""
    notes: dict[str, int] = field(default_factory=dict)
    """Documents with a remark, counted by remark."""

    def __post_init__(self) -> None:
        self.text_bytes = self.text_bytes or [0] * self.outputs


class Journal:
    """The file. task: what the work is, for comparison."""

    def __init__(self, output_prefix: str, task: str) -> None:
        self.path = Path(f"{output_prefix}_preprocess.journal")
        self._task = task

    def read(self) -> tuple[PreprocessCounts, list[Mark]] | None:
        """Where an interrupted work of the same task stopped, or None when there was none.

        Raises ConfigError when the journal belongs to another task.
        """
        try:
            state = json.loads(self.path.read_text(encoding="utf-8"))
            if state["task"] == self._task:
                counts = state["counts"]
                counts["skipped"] = SkippedCounts(**counts["skipped"])
                return PreprocessCounts(**counts), [Mark(**mark) for mark in state["marks"]]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError.of(
                f"the journal of the earlier attempt cannot be read ({error})",
                key="resume",
                location=str(self.path),
                hint="leave out --resume, and start afresh",
            ) from error
        raise ConfigError.of(
            "the earlier attempt had other input files, another tokenizer or other options",
            key="resume",
            location=str(self.path),
            hint="repeat its command line, or leave out --resume and start afresh",
        )

    def write(self, counts: PreprocessCounts, marks: Sequence[Mark]) -> None:
        """Keeps a state."""
        state = {"task": self._task, "counts": asdict(counts), "marks": [asdict(mark) for mark in marks]}
        write_atomic(self.path, json.dumps(state), durable=True)

    def remove(self) -> None:
        """The work is done, or starts afresh."""
        self.path.unlink(missing_ok=True)


def task_of(files: Sequence[TextFile], settings: Mapping[str, Any]) -> str:
    """A digest of the input files, by name, size and time of change, and of everything that decides the output."""
    inputs = [[str(file.path), file.bytes, file.path.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps([inputs, settings], sort_keys=True, default=str).encode()).hexdigest()


class SkippedFile:
    """A context for the list of skipped records, which is only there when there is one."""

    def __init__(self, output_prefix: str, size: int) -> None:
        self.path = Path(f"{output_prefix}_skipped.jsonl")
        self.keep = False
        self._size = size
        self._file: IO[bytes] | None = None

    def __enter__(self) -> SkippedFile:
        if self._size:
            self._open()
        else:
            partial(self.path).unlink(missing_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None and self._size:
            os.replace(partial(self.path), self.path)
        elif kind is None:
            self.path.unlink(missing_ok=True)  # of an earlier work
        elif not self.keep:
            partial(self.path).unlink(missing_ok=True)

    def add(self, record: SkippedRecord) -> None:
        """One more."""
        file = self._file or self._open()
        entry = {"file": record.name, "line": record.number, "reason": record.reason, "detail": record.detail}
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")
        file.write(line)
        self._size += len(line)

    def mark(self) -> int:
        """Forces what was added to disk, and says how far it goes [bytes]."""
        if self._file is not None:
            flush_to_disk(self._file)
        return self._size

    def _open(self) -> IO[bytes]:
        path = partial(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        if file.seek(0, os.SEEK_END) < self._size:
            file.close()
            raise RunError.of(
                "the list of skipped lines is shorter than it was", location=str(path), hint="start afresh"
            )
        file.truncate(self._size)
        file.seek(self._size)
        self._file = file
        return file
