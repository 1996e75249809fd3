"""The token loop: one token after another, with the keys and values of the past kept in a cache.

The loop runs alike on every rank that holds a part of the model: the scores are the same there, and so are the choices.

b batch (1 here), s sequence, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.engine.engine import Engine
from megatron.inference.sampling import Sampler

if TYPE_CHECKING:
    from megatron.model.cache import KVCache


@dataclass(frozen=True)
class Limits:
    """Where a text ends: at `eod`, after `maximum_tokens` new tokens, or when it is `seq_length` tokens long in all."""

    eod: int
    maximum_tokens: int
    seq_length: int

    def room(self, prompt_tokens: int) -> int:
        """How many tokens may follow a prompt of that length."""
        return max(0, min(self.maximum_tokens, self.seq_length - prompt_tokens))


@dataclass(frozen=True)
class Step:
    """One new token, and the scores [v] that it was chosen from."""

    token: int
    logits: Tensor


@torch.no_grad()
def decode(
    engine: Engine,
    prompt: Sequence[int],
    *,
    limits: Limits,
    sampler: Sampler,
    cache: KVCache | None = None,
) -> Iterator[Step]:
    """Yields the new tokens of one text; the last one is `eod` when the model ended it.

    prompt: at least one token. cache: for one sequence of `limits.seq_length` tokens; it is emptied first, so that one
    cache serves many prompts. Without a cache the whole text runs through the model again for each token.
    """
    if not prompt:
        raise ValueError("a text starts with at least one token")
    if cache is not None:
        cache.reset()
    text = list(prompt)
    fresh = text
    for _ in range(limits.room(len(prompt))):
        tokens = torch.tensor([fresh])  # [1, s]
        logits = engine.logits(tokens, cache)[0, -1]  # [v]
        token = sampler.choose(logits, text)
        yield Step(token, logits)
        if token == limits.eod:
            return
        text.append(token)
        fresh = text if cache is None else [token]
