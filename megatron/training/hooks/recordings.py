"""Hooks that write files of their own beside the metrics: fingerprints, traces, memory snapshots."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from megatron.config.schema.observe import ObserveSection
from megatron.engine.base import BaseEngine
from megatron.errors import ConfigError
from megatron.metrics.fingerprint import Fingerprints
from megatron.metrics.profiler import MemoryRecorder, Tracer
from megatron.training.hooks.base import Hook
from megatron.training.run_state import RunState
from megatron.training.step_schedule import StepSize


class FingerprintHook(Hook):
    """Writes fingerprints of the steps that are due."""

    def __init__(self, fingerprints: Fingerprints) -> None:
        self._fingerprints = fingerprints

    def around_step(self, iteration: int, size: StepSize) -> AbstractContextManager[None]:
        return self._fingerprints.recording(iteration)


class ProfilerHook(Hook):
    """Records some steps with a profiler, and closes it at the end of the run."""

    def __init__(self, recorder: Tracer | MemoryRecorder) -> None:
        self._recorder = recorder

    def around_step(self, iteration: int, size: StepSize) -> AbstractContextManager[None]:
        return self._recorder.recording(iteration)

    def on_run_end(self, state: RunState) -> None:
        self._recorder.close()


def recording_hooks(observe: ObserveSection, engine: BaseEngine, *, log: Callable[[str], None]) -> list[Hook]:
    """Returns the recordings that the section enables. Raises ConfigError where one is not possible on this machine."""
    hooks: list[Hook] = []
    rank = engine.topology.rank
    if observe.fingerprint_interval is not None and observe.log_dir is not None:
        folder, interval = Path(observe.log_dir), observe.fingerprint_interval
        hooks.append(FingerprintHook(Fingerprints(folder, rank, interval, engine.layers(), engine.parameters)))
    steps = (observe.profile_step_start, observe.profile_step_stop)
    if observe.profile:
        if observe.log_dir is None:
            raise ConfigError.of("a trace needs a folder", key="profile", value=True, hint="set log_dir")
        hooks.append(ProfilerHook(Tracer(Path(observe.log_dir), rank, *steps, log)))
    if observe.memory_profiling:
        folder = Path(observe.memory_profiling_path or observe.log_dir or ".")
        hooks.append(ProfilerHook(MemoryRecorder(folder, rank, *steps, log)))
    return hooks
