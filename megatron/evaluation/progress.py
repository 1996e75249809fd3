"""A line now and then about work that takes long."""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron.log import get_logger
from megatron.metrics.console import duration

_SECONDS = 10.0


class Progress:
    """Says how far a piece of work is, at most every ten seconds, so that short work is silent.

    what: the work, as "scoring". say: where lines go, the log by default. Call it with the fraction that is done.
    """

    def __init__(
        self,
        what: str,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._say = say or get_logger(__name__).info
        self._clock = clock
        self._started = self._said = clock()

    def __call__(self, fraction: float) -> None:
        now = self._clock()
        if now - self._said < _SECONDS or fraction <= 0:
            return
        self._said = now
        left = (now - self._started) * (1 - fraction) / fraction
        self._say(f"{self._what}: {100 * fraction:.0f} %, {duration(left)} left")
