"""Perplexity a character: what the loss of an evaluation means a character of its text in place of a token.

Tokenizers cut text differently, so that a token's perplexity compares only runs of one tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron.data.dataset.batch import MicroBatch
from megatron.metrics.reporter import perplexity
from megatron.tokenizers import Tokenizer


class Characters:
    """Counts the tokens that are predicted and the characters of their text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens = self._characters = 0

    def counted(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The same batches; starts counting anew."""
        self._tokens = self._characters = 0
        for batch in batches:
            for labels, mask in zip(batch.labels, batch.loss_mask, strict=True):
                predicted = labels[mask > 0].tolist()
                self._tokens += len(predicted)
                self._characters += len(self._tokenizer.decode(predicted))
            yield batch

    def perplexity(self, loss: float) -> float:
        """exp(nats a character) of the counted batches of all ranks; collective. loss: [nats a token]."""
        counts = torch.tensor([self._tokens, self._characters], dtype=torch.float64)
        if dist.is_initialized() and dist.get_world_size() > 1:
            counts = counts.cuda() if dist.get_backend() == "nccl" else counts
            dist.all_reduce(counts)
        tokens, characters = counts.tolist()
        return perplexity(loss * tokens / max(characters, 1.0))
