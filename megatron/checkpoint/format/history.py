"""Which checkpoints a checkpoint was trained from, where a save folder has those of several histories.

A run that goes on from an earlier iteration leaves the later checkpoints of the first one in the folder. So each
checkpoint names, in state/run.json, the process that wrote it and the checkpoints that its run had before, by iteration
and process; one that was replaced since is another checkpoint.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.format import files, layout
from megatron.errors import RunError

PROCESS, HISTORY = "process", "history"
_MOST = 4096
"""Checkpoints that are named at most, the newest."""


@dataclass(frozen=True)
class SavedStep:
    """A checkpoint, by what no other has."""

    iteration: int
    """Iteration."""
    process: str | None
    """The process that wrote it; None where that is not stored."""


class History:
    """The checkpoints of a run so far: those of the checkpoint that it goes on from, and its own.

    loaded: The checkpoint that the run goes on from; None where iterations count from 0.
    """

    def __init__(self, loaded: Path | None) -> None:
        self._process = secrets.token_hex(8)
        self._before: list[SavedStep] = []
        if loaded is not None:
            number = layout.iteration_of(loaded)
            own = [] if number is None else [SavedStep(number, _facts(loaded).get(PROCESS))]
            self._before = [*(_recorded(loaded) or ()), *own]

    def facts(self, iteration: int) -> dict[str, Any]:
        """Returns what the next checkpoint says of itself, and counts it as written."""
        before = [one for one in self._before if one.iteration < iteration]
        self._before = [*before, SavedStep(iteration, self._process)]
        return {PROCESS: self._process, HISTORY: [[one.iteration, one.process] for one in before[-_MOST:]]}


def ancestors(save: Path, iteration: int) -> list[int]:
    """Returns the iterations of the checkpoints in a folder that one was trained from, in rising order.

    For checkpoints of earlier versions, which do not say so, all before it.
    """
    there = [number for number in layout.iterations(save) if number < iteration]
    recorded = _recorded(layout.step_directory(save, iteration))
    if recorded is None:
        return there
    named = {one.iteration: one.process for one in recorded}
    found = [number for number in there if number in named and _process(save, number) == named[number]]
    first = min(named, default=None)
    if first in found and named[first] is None:  # written by an earlier version, like those before it
        found = [*(number for number in there if number < first), *found]
    return found


def other_history(checkpoint: Path, newer: Path) -> bool:
    """Whether a newer checkpoint says that it was not trained from this one."""
    older, number = layout.iteration_of(checkpoint), layout.iteration_of(newer)
    if older is None or number is None or not newer.is_dir():
        return False
    try:
        return older not in ancestors(newer.parent, number)
    except (RunError, TypeError, ValueError):  # it is damaged
        return False


def _process(save: Path, iteration: int) -> str | None:
    found: str | None = _facts(layout.step_directory(save, iteration)).get(PROCESS)
    return found


def _recorded(directory: Path) -> Sequence[SavedStep] | None:
    found = _facts(directory).get(HISTORY)
    return None if found is None else [SavedStep(int(iteration), process) for iteration, process in found]


def _facts(directory: Path) -> dict[str, Any]:
    """Returns the facts of the run; none of a checkpoint of another program."""
    path = directory / layout.RUN
    return dict(files.read_json(path)) if path.is_file() else {}
