"""A training step in a process of its own, which another one asks for single steps.

Contenders that alternate in one process would share its allocator and its threads. Here each starts as its user starts
it: with environment variables of its own, and nothing else in its memory.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from time import perf_counter

Step = Callable[[], float]


def _serve(connection: Connection, build: Callable[[], Step]) -> None:
    """The process: builds the step, and answers every request with its seconds and the peak memory so far [bytes]."""
    step = build()
    with suppress(EOFError):
        while connection.recv():
            started = perf_counter()
            step()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            connection.send((perf_counter() - started, peak))


class StepProcess:
    """One contender; `peak` is the most memory that its process has held [bytes]."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.peak = 0

    def __call__(self) -> float:
        """Makes a step; returns its seconds."""
        self._connection.send(True)
        seconds, self.peak = self._connection.recv()
        return float(seconds)


@contextmanager
def step_process(build: Callable[[], Step], variables: Mapping[str, str]) -> Iterator[StepProcess]:
    """Starts a process that makes the steps of `build`, a function that can be pickled.

    Args:
        build: Returns the step.
        variables: Environment variables besides those of this process.
    """
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=partial(_serve, theirs, build), daemon=True)
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    theirs.close()
    try:
        yield StepProcess(mine)
    finally:
        mine.close()
        process.join(30)
        process.kill()
