"""How lm-eval's metrics and their error bars are computed here: large perplexities, and no processes of their own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from lm_eval.api import metrics

from megatron.metrics.reporter import perplexity

ONE_PROCESS = "DISABLE_MULTIPROC"
"""Environment variable that lm-eval reads before it resamples."""


@contextmanager
def infinite_perplexities() -> Iterator[None]:
    """Perplexities and error bars of lm-eval's metrics that no number holds are infinite; its own end the evaluation.

    Only what its module calls `math.exp` and `sample_stddev` is another: error bars are known by the identity of the
    metrics.
    """
    module: Any = metrics
    before = module.math, module.sample_stddev
    module.math = SimpleNamespace(**{**vars(math), "exp": perplexity})
    module.sample_stddev = _infinite_at_overflow(metrics.sample_stddev)
    try:
        yield
    finally:
        module.math, module.sample_stddev = before


def _infinite_at_overflow(function: Callable[[Sequence[float]], float]) -> Callable[[Sequence[float]], float]:
    """The same function; infinite where the squares of finite numbers overflow."""

    def safe(values: Sequence[float]) -> float:
        try:
            return function(values)
        except OverflowError:
            return math.inf

    return safe


@contextmanager
def one_process() -> Iterator[None]:
    """lm-eval resamples in this process, with the same result.

    Its pool of processes is for a program that only evaluates: its forks would inherit the signal handlers of a rank
    that trains, and a fork that does not end at SIGTERM is waited for without end.
    """
    before = os.environ.get(ONE_PROCESS)
    os.environ[ONE_PROCESS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ONE_PROCESS]
        else:
            os.environ[ONE_PROCESS] = before
