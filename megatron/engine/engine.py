"""Interfaces of engines, independent of the layout of the model.

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
    """Results of one optimizer step. Values stay on the device until they are read."""

    loss: Tensor
    """Mean over all unmasked tokens of the global batch [nats a token]."""
    grad_norm: Tensor
    """Gradient norm before clipping."""
    learning_rate: float
    """Learning rate of the step."""
    loss_scale: float
    """1 unless fp16."""
    skipped: Tensor
    """True if the update was skipped because gradients were not finite, bool."""
    more: Mapping[str, Tensor] = field(default_factory=dict)
    """Further measurements of the model, by name."""
    learns: Tensor | None = None
    """Whether the global batch has a token to learn, bool: without one its loss is 0; None where that is not known."""
    outlier: Tensor | None = None
    """True if the update was skipped because the loss was an outlier, bool; None where none is looked for."""


class Engine(Protocol):
    """An engine that runs a model; training engines step it too. All methods are collective."""

    def logits(self, tokens: Tensor, cache: KVCache | None = None, at: Tensor | None = None) -> Tensor:
        """Returns logits of the next token, fp32 [b, s, v], the same on all ranks of the replica.

        Args:
            tokens: [b, s]; they continue the sequences in the cache, and are added to it.
            cache: cache of earlier tokens.
            at: positions in the flattened [b, s] to return instead of all; the result is then [k, v].
        """

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """Returns an empty cache for `batch` sequences of at most `max_length` tokens."""


class TrainingEngine(Engine, Protocol):
    """An engine with an optimizer."""

    def prepare(self, micro_batches: int, length: int) -> None:
        """Sets the micro batches a rank and the sequence length [tokens] of the coming steps."""

    def train_step(self, batches: Iterator[MicroBatch], learning_rate: float) -> StepResult:
        """Makes one update from the next `gradient accumulation` micro batches, at the given learning rate."""

    def eval_sums(self, batches: Iterator[MicroBatch], count: int) -> tuple[float, float]:
        """Returns the sum of losses [nats] and the number of unmasked tokens of the next `count` micro batches.

        Both are sums over all data ranks.
        """

    def take_loss_parts(self) -> Mapping[str, float]:
        """Returns name -> mean of the losses beside that of tokens since the last call; {} for a model without them."""

    @property
    def min_eval_batches(self) -> int:
        """Smallest number of micro batches for one call of `eval_sums` that keeps pipeline stages busy."""


def eval_loss(engine: TrainingEngine, batches: Iterator[MicroBatch], count: int) -> float:
    """Mean loss over unmasked tokens of the next `count` micro batches of every data rank [nats a token]."""
    loss, tokens = engine.eval_sums(batches, count)
    return loss / max(1.0, tokens)


def loss_scale(optimizer: Any) -> float:
    """Returns the loss scale of DeepSpeed's optimizer; 1 unless the model is in fp16."""
    return float(getattr(getattr(optimizer, "loss_scaler", optimizer), "cur_scale", 1.0))


def as_tensor(value: float | Tensor | None) -> Tensor:
    """Converts a number that DeepSpeed reports as float or tensor; None becomes NaN."""
    if isinstance(value, Tensor):
        return value.detach()
    return torch.tensor(float("nan") if value is None else float(value))
