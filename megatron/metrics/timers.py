"""Wall-clock time of steps.

On a GPU the host runs ahead of the device, so a time is only right after a synchronization, and one at every step costs
speed. `StepClock` synchronizes once per log point and reports the mean over the iterations since the last one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def no_wait() -> None:
    """Does nothing: the `synchronize` of a CPU."""


class StepClock:
    """Mean seconds per iteration between log points, without evaluation and saving.

    synchronize: waits for the device (`torch.cuda.synchronize` on a GPU); called at log points and around
    excluded work.
    """

    def __init__(
        self, synchronize: Callable[[], None] = no_wait, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._iterations = 0
        self._excluded = 0.0
        self._started = self._now()

    def count(self) -> None:
        """Counts one finished iteration. Does not wait for the device."""
        self._iterations += 1

    def lap(self) -> float:
        """Returns the mean seconds per iteration since the last lap (NaN without any); starts the next lap."""
        now = self._now()
        elapsed = now - self._started - self._excluded
        mean = elapsed / self._iterations if self._iterations else float("nan")
        self._started, self._iterations, self._excluded = now, 0, 0.0
        return mean

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Excludes the enclosed work (an evaluation, a save) from the iteration time."""
        before = self._now()
        try:
            yield
        finally:
            self._excluded += self._now() - before

    def _now(self) -> float:
        self._synchronize()
        return self._clock()
