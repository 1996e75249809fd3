"""Layouts of pipelines with several stages a rank, on at most 8 ranks.

    python -m tests.parity.scheduled 120:192

runs those rows, or all of them without a range, and prints a table with the deviation of each from one process.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron.config.derived.pipe_layout import CHUNKS
from megatron.pipe_schedule.layout import PipeLayout
from tests.parity.matrix import MODELS, MOST_RANKS, TINY, Comparison, Row, chosen_rows

TOGETHER = 8
"""Rows that are trained in one world: 8 ranks on two cores must be done with them within its time limit."""


@dataclass(frozen=True)
class ScheduledRow(Row):
    """A layout with a schedule."""

    schedule: str = "interleaved"

    @property
    def legal(self) -> bool:
        divides = TINY["train_batch_size"] % (self.acc * self.dp) == 0
        return super().legal and divides and PipeLayout(self.schedule, self.pp, CHUNKS).takes(self.acc)

    @property
    def layers(self) -> int:
        """Blocks of the model: one for each stage."""
        return CHUNKS * self.pp

    def settings(self) -> dict[str, Any]:
        """The keys of the configuration."""
        return {**super().settings(), "pipe_schedule": self.schedule}

    def __str__(self) -> str:
        numbers = " ".join(f"{name}={int(value)}" for name, value in asdict(self).items() if name != "schedule")
        return f"{self.schedule} {numbers}"


SIZES: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2),
    "pp": (2, 4),
    "dp": (1, 2),
    "zero": (0, 1),
    "acc": (4, 8),
    "sp": (False, True),
    "cp": (1, 2),
    "ring": (False, True),
    "schedule": ("interleaved", "zero_bubble", "dualpipev"),
}


@cache
def rows() -> tuple[tuple[ScheduledRow, str], ...]:
    """All legal rows with their models in turn, small worlds first."""
    every = (ScheduledRow(*values) for values in itertools.product(*SIZES.values()))
    legal = sorted((row for row in every if row.legal and row.ranks <= MOST_RANKS), key=lambda row: row.ranks)
    return tuple((row, list(MODELS)[number % len(MODELS)]) for number, row in enumerate(legal))


@cache
def covering() -> tuple[tuple[ScheduledRow, str], ...]:
    """Rows that hold every schedule with every value of each setting, in worlds of four ranks."""
    held = {
        (row, model): {(row.schedule, name, value) for name, value in asdict(row).items()}
        for row, model in rows()
        if row.ranks == 4
    }
    missing = set().union(*held.values())
    chosen = []
    while missing:
        best = max(held, key=lambda key: len(held[key] & missing))
        missing -= held[best]
        chosen.append(best)
    return tuple(chosen)


def main(expected: str) -> int:
    """Prints the table; 1 if any row deviates."""
    numbers = chosen_rows(expected, len(rows()))
    failed = 0
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        comparison = Comparison(Path(folder))
        for position, number in enumerate(numbers):
            if position % TOGETHER == 0:
                comparison.train_together([rows()[other] for other in numbers[position : position + TOGETHER]])
            row, model = rows()[number]
            difference = comparison.of(row, model)
            failed += not difference.good
            print(f"{number:4}  {row!s:66} {model:6} {difference}{'' if difference.good else '  FAILED'}", flush=True)
    print(f"{len(numbers) - failed} rows agree with one process, {failed} do not")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
