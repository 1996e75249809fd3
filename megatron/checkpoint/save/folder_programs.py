"""A program that runs beside training for some of a run's checkpoints, such as one that converts them.

One runs at a time. A checkpoint that waits for its program, or is read by it, is not removed.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from megatron.checkpoint.format import layout

_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class FolderPrograms:
    """Starts the program for every checkpoint whose iteration is a multiple of a number."""

    def __init__(self, command: Sequence[str], every: int, target: str, say: Callable[[str], None]) -> None:
        """Creates an empty queue.

        Args:
            command: The program; a checkpoint's folder and the folder to write follow as arguments.
            every: Number that the iteration is a multiple of [steps].
            target: Name of the folder beside the checkpoints, in which each gets a folder.
            say: Prints a line about a program that failed.
        """
        self._command, self._every, self._target, self._say = list(command), every, target, say
        self._waiting: deque[Path] = deque()
        self._running: tuple[Path, subprocess.Popen[bytes], IO[bytes]] | None = None
        self._lock = threading.Lock()  # a checkpoint may be completed by a thread

    def send(self, checkpoint: Path) -> None:
        """Takes a complete checkpoint in, where its iteration asks for it."""
        number = layout.iteration_of(checkpoint)
        if number is not None and number > 0 and number % self._every == 0:
            self._waiting.append(checkpoint)
        self.poll()

    def pending(self) -> list[Path]:
        """Returns the checkpoints that are needed still."""
        return [*self._waiting, *([] if self._running is None else [self._running[0]])]

    def poll(self, seconds: float = 0.0) -> None:
        """Ends a program that is done, and starts the next one. seconds: how long to wait for it at most."""
        with self._lock:
            self._poll(seconds)

    def _poll(self, seconds: float) -> None:
        if self._running is not None:
            checkpoint, process, output = self._running
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return
            self._running = None
            output.seek(0)
            lines = output.read().decode(errors="replace").strip().splitlines()
            output.close()
            if code:
                self._say(f"no {self._target} folder for {checkpoint.name}: {lines[-1] if lines else f'exit {code}'}")
        if self._waiting:
            self._start(self._waiting.popleft())

    def finish(self) -> None:
        """Waits for all programs."""
        while self.pending():
            self.poll(seconds=3600.0)

    def _start(self, checkpoint: Path) -> None:
        target = checkpoint.parent / self._target / checkpoint.name
        target.parent.mkdir(exist_ok=True)
        output = tempfile.TemporaryFile()  # noqa: SIM115  closed where the program has ended
        environment = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        process = subprocess.Popen(
            [*self._command, str(checkpoint), str(target)],
            env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a signal for training is none for it
        )
        self._running = checkpoint, process, output
