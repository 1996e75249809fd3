"""What every engine can do, whichever way its model is laid out.

s sequence, b micro batch, v padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.data.dataset.batch import MicroBatch
from megatron.model.kv_cache import KVCache


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured. Values stay on the device until someone reads them.

    loss: mean over all unmasked tokens of the global batch [nats a token]. grad_norm: before clipping.
    loss_scale: 1 unless fp16. skipped: whether the update was left out because gradients were not finite.
    more: what else the model measured, by name.
    """

    loss: Tensor
    grad_norm: Tensor
    learning_rate: float
    loss_scale: float
    skipped: bool
    more: Mapping[str, Tensor] = field(default_factory=dict)


class Engine(Protocol):
    """An engine that can run its model; training engines step it too. All methods are collective."""

    def logits(self, tokens: Tensor, cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        """Scores of the next token, fp32 [b, s, v], the same on every rank that holds a part of the model.

        tokens [b, s] continue what the cache already holds, and are added to it. at: the places of the flattened
        [b, s] whose scores are wanted, in place of all; the result is then [k, v].
        """

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `batch` sequences of at most `max_length` tokens."""


class TrainingEngine(Engine, Protocol):
    """An engine with an optimizer."""

    def prepare(self, micro_batches: int, length: int) -> None:
        """The coming steps take that many micro batches a rank, of sequences of that length [tokens]."""

    def train_step(self, batches: Iterator[MicroBatch], learning_rate: float) -> StepResult:
        """One update from the next `gradient accumulation` micro batches, at the given rate."""

    def eval_sums(self, batches: Iterator[MicroBatch], count: int) -> tuple[float, float]:
        """Of the next `count` micro batches of every data rank: the sum of the unmasked tokens' losses [nats], and how
        many such tokens there are [tokens].
        """

    @property
    def least_evaluated(self) -> int:
        """Micro batches that one call of `eval_sums` should be given at least, so that no stage waits long."""


def eval_loss(engine: TrainingEngine, batches: Iterator[MicroBatch], count: int) -> float:
    """Mean over all unmasked tokens of the next `count` micro batches of every data rank [nats a token]."""
    loss, tokens = engine.eval_sums(batches, count)
    return loss / max(1.0, tokens)


def loss_scale(optimizer: Any) -> float:
    """The factor on the loss of DeepSpeed's optimizer; 1 unless the model is in fp16."""
    return float(getattr(getattr(optimizer, "loss_scaler", optimizer), "cur_scale", 1.0))


def as_tensor(value: float | Tensor | None) -> Tensor:
    """DeepSpeed reports numbers as floats or tensors; a missing one is NaN."""
    if isinstance(value, Tensor):
        return value.detach()
    return torch.tensor(float("nan") if value is None else float(value))
