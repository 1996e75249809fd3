"""Rank-aware loggers that write to stderr.

    log = get_logger(__name__)
    log.info("checkpoint written to %s", path)      # rank 0 only
    log.warning("the file system answers slowly")   # every rank

When a world has more than one rank, each line starts with its rank. An entry point calls `configure` once; a module
only calls `get_logger`. The rank comes from the environment, so nothing here waits for torch.distributed.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from megatron.ranks import Ranks

ROOT = "megatron"


def get_logger(name: str) -> logging.Logger:
    """Returns the logger of a module (`__name__`), a child of the logger "megatron" that `configure` sets up."""
    return logging.getLogger(name if name == ROOT or name.startswith(f"{ROOT}.") else f"{ROOT}.{name}")


def configure(level: str | int | None = None) -> None:
    """Sends the loggers' lines to stderr. A second call replaces the settings of the first.

    Args:
        level: a name or number of `logging`; LOGLEVEL, else INFO, by default. Ranks other than 0 log from WARNING on,
            unless the level is DEBUG.
    """
    root = logging.getLogger(ROOT)
    for old in [handler for handler in root.handlers if isinstance(handler, _StderrHandler)]:
        root.removeHandler(old)
    handler = _StderrHandler()
    ranks = Ranks.from_environment()
    handler.setFormatter(_LineFormatter(ranks.rank if ranks.world_size > 1 else None))
    root.addHandler(handler)
    root.setLevel(_effective(level if level is not None else os.environ.get("LOGLEVEL", "INFO")))
    root.propagate = False


def _effective(level: str | int) -> int:
    number = level if isinstance(level, int) else logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    return number if Ranks.from_environment().rank == 0 or number <= logging.DEBUG else max(number, logging.WARNING)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is at that moment, as a redirected stream expects."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream is always sys.stderr")


class _LineFormatter(logging.Formatter):
    """`13:05:41 [rank 3] warning: text`, on every line of a message; the level is left out for information."""

    def __init__(self, rank: int | None) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        start = self.formatTime(record, self.datefmt) + " "
        if self._rank is not None:
            start += f"[rank {self._rank}] "
        if record.levelno != logging.INFO:
            start += f"{record.levelname.lower()}: "
        return "\n".join(start + line for line in super().format(record).splitlines() or [""])
