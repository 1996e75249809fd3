"""Traces of time (torch's profiler) and of memory (the GPU allocator's history) for some steps.

Both record the steps profile_step_start <= t < profile_step_stop. A trace opens in chrome://tracing or Perfetto, a
snapshot at pytorch.org/memory_viz.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron.errors import ConfigError

TRACES = "profile"
SNAPSHOT = "mem_snapshot.pickle"


class Tracer:
    """Writes `<log_dir>/profile/rank_<r>_steps_<first>-<last>.json`.

    Args:
        log_dir: Run directory.
        rank: Global rank.
        start: First step.
        stop: Step after the last one.
        log: Prints a line.
    """

    def __init__(self, log_dir: Path, rank: int, start: int, stop: int, log: Callable[[str], None]) -> None:
        self._path = log_dir / TRACES / f"rank_{rank:05d}_steps_{start}-{stop - 1}.json"
        self._start, self._stop, self._log = start, stop, log
        self._profiler: Any = None

    @contextmanager
    def recording(self, iteration: int) -> Iterator[None]:
        """Records the step of that iteration."""
        if iteration == self._start:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()
        try:
            yield
        finally:
            if self._profiler is not None and iteration == self._stop - 1:
                self.close()

    def close(self) -> None:
        """Ends a running trace."""
        if self._profiler is None:
            return
        self._profiler.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._path))
        self._profiler = None
        self._log(f"the trace of these steps is {self._path}")


class MemoryRecorder:
    """Writes `<folder>/mem_snapshot.pickle`, with the rank in the name for every rank but the first.

    Args:
        folder: Folder to write to.
        rank: Global rank.
        start: First step.
        stop: Step after the last one.
        log: Prints a line.
    """

    MAX_EVENTS = 100_000

    def __init__(self, folder: Path, rank: int, start: int, stop: int, log: Callable[[str], None]) -> None:
        if not torch.cuda.is_available():
            raise ConfigError.of(
                "memory snapshots are those of the GPU allocator, and there is no GPU",
                key="memory_profiling",
                value=True,
                hint="leave it out; runtime/peak_memory_bytes is the peak on a CPU",
            )
        self._path = folder / (SNAPSHOT if rank == 0 else f"rank_{rank:05d}_{SNAPSHOT}")
        self._start, self._stop, self._log = start, stop, log
        self._recording = False

    @contextmanager
    def recording(self, iteration: int) -> Iterator[None]:
        """Records the step of that iteration. A step that runs out of memory writes a snapshot too."""
        if iteration == self._start:
            torch.cuda.memory._record_memory_history(max_entries=self.MAX_EVENTS)
            self._recording = True
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            self.close()
            raise
        if iteration == self._stop - 1:
            self.close()

    def close(self) -> None:
        """Writes the snapshot of a running history."""
        if not self._recording:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(self._path))
        torch.cuda.memory._record_memory_history(enabled=None)
        self._recording = False
        self._log(f"the memory snapshot of these steps is {self._path}")
