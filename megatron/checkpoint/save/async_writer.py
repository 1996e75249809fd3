"""Writing checkpoints while the training goes on: a thread a rank, and no collective calls in it.

Each rank writes its files and then a list of them, state/written_RRRRR.json. The first rank's thread waits for the
lists of all ranks and completes the checkpoint. So nothing that the training does at the same time can get in the way,
and a rank that dies leaves a checkpoint that never got its name.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from megatron.atomic import atomic_writer, flush_to_disk, sync_directory
from megatron.checkpoint.format import files, layout
from megatron.checkpoint.format.files import Written
from megatron.checkpoint.save.snapshot import Snapshot
from megatron.errors import RunError

_LOOK = 0.05  # seconds between two looks for the other ranks' lists
_LEAST_PRIORITY = 19
_SECONDS_AFTER_AN_ERROR = 60.0
_SECONDS_FOR_OTHERS = 2.0

Complete = Callable[[Sequence[Written]], None]


class BackgroundWriter:
    """One save in flight at most.

    rank, world_size: of all processes. patience [s]: how long the first rank waits for the others' files.
    """

    def __init__(self, rank: int, world_size: int, patience: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.patience = patience
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._abandoned = False

    def start(self, partial: Path, snapshot: Snapshot, complete: Complete) -> None:
        """Begins to write; returns at once. complete: names the checkpoint, called on the first rank."""
        assert self._thread is None, "the save before was waited for"
        self._thread = threading.Thread(
            target=self._run, args=(partial, snapshot, complete), name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a save is in flight; does not wait."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Returns when the save in flight, if any, is done. Raises what went wrong: OSError, RuntimeError, RunError."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def abandon(self) -> None:
        """Waits for the save in flight, if any, after an error elsewhere: it is completed if it can be within seconds.

        A thread that is inside torch when the interpreter ends aborts the process.
        """
        self._abandoned = True
        if self._thread is not None:
            self._thread.join(_SECONDS_AFTER_AN_ERROR)

    def check(self) -> None:
        """Raises RunError if the save in flight has failed; does not wait."""
        if self._error is not None:
            self.wait()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, partial: Path, snapshot: Snapshot, complete: Complete) -> None:
        with suppress(OSError, AttributeError):  # only where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        try:
            with files.sharing_the_interpreter():
                written = list(snapshot.write(partial))
            _announce(partial, self.rank, written)
            if self.rank == 0:
                complete(self._gather(partial))
        except (OSError, RuntimeError, RunError) as error:
            reported = error if isinstance(error, RunError) else _as_run_error(partial, error)
            self._error = reported
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)

    def _gather(self, partial: Path) -> list[Written]:
        """The files of all ranks, once all have announced them. RunError when one takes too long."""
        deadline = time.monotonic() + self.patience
        found: list[Written] = []
        for rank in range(self.world_size):
            path = partial / layout.written_file(rank)
            while not path.is_file():
                if self._abandoned:
                    deadline = min(deadline, time.monotonic() + _SECONDS_FOR_OTHERS)
                if time.monotonic() > deadline:
                    raise RunError.of(
                        f"rank {rank} has not written its part after {self.patience:.0f} s, or not where rank 0 looks",
                        location=str(partial),
                        hint="save to a folder on a file system that all nodes share",
                    )
                time.sleep(_LOOK)
            found += [Written(partial / name, size, sha) for name, size, sha in files.read_json(path)]
            path.unlink()
        return found


def _announce(partial: Path, rank: int, written: Sequence[Written]) -> None:
    """The last that this rank does here: the first one may give the folder its final name a moment later."""
    entries = [[str(each.path.relative_to(partial)), each.size, each.sha256] for each in written]
    path = partial / layout.written_file(rank)
    sync_directory(path.parent)
    with atomic_writer(path) as file:  # durable but for its name: the folder may be gone then
        file.write(json.dumps(entries).encode())
        flush_to_disk(file)


def _as_run_error(partial: Path, error: Exception) -> RunError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RunError.of(f"writing {partial} failed: {reason}", hint="the checkpoints written before are complete")
