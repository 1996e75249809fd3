"""What the watch over a training run is told: which part of the loop is under way, and in which iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from typing import ParamSpec, TypeVar

from megatron.data.dataset.batch import MicroBatch
from megatron.health.heartbeat import SAVING, TASKS
from megatron.health.watchdog import Watch
from megatron.training.loop import BatchSource, Parts
from megatron.training.step_schedule import StepSize

P = ParamSpec("P")
R = TypeVar("R")


def watched(parts: Parts, watch: Watch, waiting: Callable[[], AbstractContextManager[None]] = nullcontext) -> Parts:
    """The same parts of a training loop, telling the watch what is going on; `waiting` is around waits for its data."""

    @contextmanager
    def recording(iteration: int, size: StepSize) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(watch.doing("training", iteration))
            stack.enter_context(parts.recording(iteration, size))
            yield

    def told(what: str, work: Callable[P, R]) -> Callable[P, R]:
        @wraps(work)
        def run(*arguments: P.args, **named: P.kwargs) -> R:
            with watch.doing(what):
                return work(*arguments, **named)

        return run

    return replace(
        parts,
        recording=recording,
        train=parts.train and WatchedBatches(parts.train, watch, waiting),
        valid=parts.valid and WatchedBatches(parts.valid, watch),
        valid_sets={name: WatchedBatches(source, watch) for name, source in parts.valid_sets.items()},
        save=parts.save and told(SAVING, parts.save),
        evaluate_tasks=parts.evaluate_tasks and told(TASKS, parts.evaluate_tasks),
    )


class WatchedBatches:
    """A source that says when its batches are waited for, to the watch and to `waiting`."""

    def __init__(
        self, source: BatchSource, watch: Watch, waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._source, self._watch, self._waiting = source, watch, waiting

    def batches(self, consumed_samples: int = 0) -> Iterator[MicroBatch]:
        """As the source's own."""
        batches = self._source.batches(consumed_samples)
        while True:
            with self._watch.doing("reading data"), self._waiting():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
