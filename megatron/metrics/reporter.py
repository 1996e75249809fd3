"""Reports the records of the training loop to the terminal and to every sink.

Metric names are a contract with their readers (dashboards, tools/plot_metrics.py):
`train/lm_loss` [nats], `train/learning_rate`, `train/grad_norm`, `train/loss_scale`, `consumed_tokens` [tokens],
`runtime/iteration_time` [s], `runtime/tokens_per_sec`, `runtime/flops_per_sec_per_gpu` [FLOP/s],
`runtime/model_flops_utilization` [fraction], `runtime/peak_memory_bytes` [bytes], `runtime/data_wait` [s a step] of the
rank that waits longest, and on several ranks `runtime/slowest_rank` and `runtime/slowest_rank_ratio` (see
straggler.py); per evaluation `<split>/lm_loss` and `<split>/lm_loss_ppl`, where split is `validation` or `test`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron.log import get_logger
from megatron.metrics.console import Console
from megatron.metrics.sinks.base import Sink


class Reporter:
    """Passes records to console and sinks; ranks other than 0 have neither.

    A sink that cannot write (a full disk) is reported once and does not stop the training.
    """

    def __init__(self, sinks: Sequence[Sink] = (), console: Console | None = None) -> None:
        self._sinks = list(sinks)
        self._console = console
        self._failing: set[int] = set()

    def train(self, iteration: int, metrics: Mapping[str, float], *, total_iterations: int) -> None:
        """Reports the training values of an iteration, under the names above."""
        if self._console is not None:
            self._console.train(iteration, metrics, total_iterations)
        self._write(iteration, metrics)

    def progress(self, iteration: int) -> None:
        """Reports an iteration without a record, which only updates a live line."""
        if self._console is not None:
            self._console.progress(iteration)

    def evaluation(self, iteration: int, split: str, metrics: Mapping[str, float]) -> None:
        """Reports an evaluation. Names without a `/` get the split in front; the perplexity of `lm_loss` is added."""
        named = {name if "/" in name else f"{split}/{name}": value for name, value in metrics.items()}
        loss = named.get(f"{split}/lm_loss")
        if loss is not None:
            named.setdefault(f"{split}/lm_loss_ppl", perplexity(loss))
        if self._console is not None:
            self._console.evaluation(iteration, split, named)
        self._write(iteration, named)

    def message(self, text: str) -> None:
        """Prints a message."""
        if self._console is not None:
            self._console.message(text)

    def close(self) -> None:
        """Ends the live line and closes the sinks. Idempotent."""
        if self._console is not None:
            self._console.close()
        for sink in self._sinks:
            try:
                sink.close()
            except OSError as error:
                self._warn_once(sink, error)
        self._sinks = []

    def _write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            try:
                sink.write(iteration, metrics)
            except OSError as error:
                self._warn_once(sink, error)

    def _warn_once(self, sink: Sink, error: OSError) -> None:
        if id(sink) not in self._failing:
            self._failing.add(id(sink))
            get_logger(__name__).warning(
                "%s cannot store metrics (%s); training continues without them", type(sink).__name__, error
            )


def perplexity(loss: float) -> float:
    """Returns exp(loss), infinite where that overflows. loss: mean negative log-likelihood [nats per token]."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
