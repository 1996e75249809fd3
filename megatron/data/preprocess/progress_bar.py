"""One line that says how far a long piece of work on text is: live on a terminal, now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from megatron.data.corpora.download import Transfer
from megatron.data.preprocess.pipeline import PreprocessProgress

TERMINAL_INTERVAL = 0.2  # seconds between two states of the live line
PLAIN_INTERVAL = 10.0  # seconds between two lines in a file
BAR = 20  # [characters]


class _ProgressLine:
    """A line that is written over on a terminal, and added to now and then in a file."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._next = 0.0 if self._live else time.monotonic() + PLAIN_INTERVAL
        self._width = 0

    def due(self) -> bool:
        """Whether enough time has passed."""
        return time.monotonic() >= self._next

    def show(self, line: str) -> None:
        """Writes it."""
        self._next = time.monotonic() + (TERMINAL_INTERVAL if self._live else PLAIN_INTERVAL)
        if self._live:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Takes the live line away."""
        if self._live and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()
            self._width = 0


class ProgressLine(_ProgressLine):
    """Call it with each state of the work; it prints when enough documents and time have passed.

    every: documents between two lines at least. known_documents: how many there are, where the user knows; otherwise
    the share of the input files that was read says how much is left.
    """

    def __init__(self, *, every: int = 100, known_documents: int | None = None, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._every = every
        self._known = known_documents
        self._documents = 0

    def __call__(self, progress: PreprocessProgress) -> None:
        if self.due() and progress.documents >= self._documents + self._every:
            self._documents = progress.documents
            line = describe(progress, self._known)
            self.show(f"{_bar(int(line.partition('%')[0]))} {line}" if self._live else line)


class TransferLine(_ProgressLine):
    """The same for files that are fetched."""

    def __init__(self, *, stream: TextIO | None = None) -> None:
        super().__init__(stream)

    def __call__(self, transfer: Transfer) -> None:
        if self.due():
            share = f"{transfer.done / transfer.total:4.0%}  " if transfer.total else ""
            total_size = f" of {transfer.total / 1e6:,.1f}" if transfer.total else ""
            self.show(f"{transfer.name}  {share}{transfer.done / 1e6:,.1f}{total_size} MB")


def _bar(percent: int) -> str:
    done = percent * BAR // 100
    return f"[{'#' * done}{'.' * (BAR - done)}]"


def describe(progress: PreprocessProgress, known_documents: int | None = None) -> str:
    """The state of the work in one line: share, documents, tokens, MB/s, documents/s, time left."""
    fraction = progress.documents / known_documents if known_documents else progress.fraction
    fraction = min(max(fraction, 0.0), 1.0)
    seconds = max(progress.seconds, 1e-9)
    left = clock(seconds / fraction - seconds) if fraction > 0 else "?"
    return (
        f"{fraction:4.0%}  {progress.documents:,} documents  {progress.tokens:,} tokens  "
        f"{progress.content_bytes / 1e6 / seconds:.1f} MB/s  {progress.documents / seconds:,.0f} docs/s  {left} left"
    )


def clock(seconds: float) -> str:
    """A time as 1:02:03 or 2:03 [s]."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
