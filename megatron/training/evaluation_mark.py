"""The iteration of the last complete evaluation, in a file beside the checkpoints.

A checkpoint is saved before the evaluation of its iteration, so that nothing that happens in the evaluation loses
training. Where the evaluation was then ended by a stop request, an error or a crash, the file names an earlier
iteration, and the resume evaluates first.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron.atomic import write_atomic
from megatron.checkpoint.format import layout
from megatron.checkpoint.save.protocol import together
from megatron.distributed.process_group import all_gather_items


class EvaluationMark:
    """The file of a save folder; its methods are collective."""

    def __init__(self, save: Path, *, resumes: bool, leads: bool) -> None:
        """Opens it.

        Args:
            save: the save folder.
            resumes: whether the run goes on from a checkpoint in this folder; what the file says counts only then.
            leads: whether this rank reads and writes it, one rank for each file system.
        """
        self._path, self._resumes, self._leads = save / layout.EVALUATED, resumes, leads

    def start(self, iteration: int) -> bool:
        """Returns whether the evaluations before the end of this iteration, if any was due, are not complete.

        Without a file, from a checkpoint of another folder, of an earlier version or of an earlier iteration than the
        last evaluation, they count as complete: from here on the file says so.

        iteration: that of the checkpoint that the run goes on from, 0 for a new run.
        """
        found = max(all_gather_items(self._read()), default=None)
        if found is not None and found < iteration:
            return True
        if found != iteration:
            self.complete(iteration)
        return False

    def complete(self, iteration: int) -> None:
        """Notes that the evaluation after this iteration is complete. RunError where the file cannot be written."""
        text = json.dumps({"iteration": iteration}) + "\n"
        together(lambda: write_atomic(self._path, text, durable=True) if self._leads else None, f"writing {self._path}")

    def _read(self) -> list[int]:
        """The iteration in the file, if there is one that can be read."""
        if not (self._leads and self._resumes):
            return []
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))["iteration"]
        except (OSError, ValueError, LookupError, TypeError):
            return []
        return [found] if isinstance(found, int) else []
