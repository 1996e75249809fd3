"""An engine for scoring tasks while a model trains, which a stop signal lets come to its end at once.

The harness cannot be left in the middle: every rank takes part in collectives of its own order. So once a stop is asked
for, the engine answers without computing, and whoever reads the scores throws them away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.engine.engine import Engine
from megatron.model.kv_cache import KVCache

_BETWEEN = 8  # forward passes from one look to the next


class StoppableEngine:
    """The engine, until `stopped`; then scores are zeros.

    asked: whether this rank was asked to stop. any_of: whether something holds on any rank that computes with this one,
    on all of those; collective.
    """

    def __init__(self, engine: Engine, asked: Callable[[], bool], any_of: Callable[[bool], bool]) -> None:
        self._engine, self._asked, self._any_of = engine, asked, any_of
        self._passes = 0
        self._vocabulary = 0  # padded, known from the first pass on [tokens]
        self.stopped = False

    def logits(self, tokens: Tensor, cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        """As the engine's own."""
        if not self.stopped and self._vocabulary and self._passes % _BETWEEN == 0:
            self.stopped = self._any_of(self._asked())
        self._passes += 1
        if self.stopped:
            return torch.zeros(*(tokens.shape if at is None else at.shape), self._vocabulary)
        scores = self._engine.logits(tokens, cache, at)
        self._vocabulary = scores.shape[-1]
        return scores

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """As the engine's own."""
        return self._engine.new_cache(batch, max_length)
