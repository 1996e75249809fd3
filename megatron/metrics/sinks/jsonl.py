"""Metrics as one JSON object per line in `<log_dir>/metrics.jsonl`, the file that every run has and every tool reads.

The file is only ever appended to, so a resumed run loses no line. A run that is killed at iteration 15 and resumed from
a checkpoint at 10 leaves 11 to 15 in the file twice; `read_metrics` resolves that: what was written later wins.
A value that is not finite is stored as null, since JSON has no NaN; `read_metrics` gives NaN back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from megatron.atomic import open_lines
from megatron.errors import ConfigError
from megatron.metrics.sinks.base import Observe, Start

FILE_NAME = "metrics.jsonl"
_TRAINING = "train/"
"""What begins names of training values."""


class JsonLines:
    """Appends one line per record to `path` and flushes it, so that a killed run has its last line on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_lines(self.path)

    @classmethod
    def open(cls, observe: Observe, start: Start) -> Self:
        """Opens the file in the run directory."""
        if observe.log_dir is None:
            raise ConfigError.of(
                "metrics need a run directory", key="log_dir", value=None, hint="name a directory for the run's logs"
            )
        return cls(Path(observe.log_dir) / FILE_NAME)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        record: dict[str, float | None] = {"iteration": iteration}
        record.update((name, _as_json(value)) for name, value in metrics.items())
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Reads the valid records of a run, ordered by iteration: one dict per iteration, with key `iteration`.

    Training and evaluation values of one iteration are merged. Where the run was resumed from an earlier iteration, the
    records after it are dropped, and so is a line that is not JSON (the end of a killed run). Raises FileNotFoundError.

    path: a metrics.jsonl, or its run directory.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    merged: dict[int, dict[str, float]] = {}
    for record in _lines(path):
        iteration = int(record["iteration"])
        if any(name.startswith(_TRAINING) for name in record):
            for stale in [known for known in merged if known >= iteration]:
                del merged[stale]
        merged.setdefault(iteration, {}).update(record)
    return [merged[iteration] for iteration in sorted(merged)]


def _lines(path: Path) -> Iterator[dict[str, float]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("iteration"), int):
                yield {name: math.nan if value is None else value for name, value in record.items()}


def _as_json(value: float) -> float | None:
    return value if math.isfinite(value) else None
