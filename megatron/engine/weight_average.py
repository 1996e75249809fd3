"""Averages of the weights over training: an exponential moving average, and the average of schedule-free optimizers.

An average has one value for each element that the optimizer of this rank updates, in the optimizer's precision, so that
ZeRO shards it like the optimizer's state. `swapped` puts the average into the model for a while: an evaluation, or a
checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.checkpoint.format.optimizer_shards import EMA, TRAINED
from megatron.engine.optimizer_state import inner_optimizer, shard_refs
from megatron.engine.publish_weights import publish
from megatron.optim.builder_args import AveragingOptimizer


class WeightAverage(ABC):
    """The average, beside an optimizer of DeepSpeed's or torch's."""

    name: str
    """Name of the extra state in checkpoints."""
    replaces_weights: bool
    """True if evaluations and checkpoints have the average in place of the weights of training."""

    def __init__(self, optimizer: Any, parameters: Mapping[str, Parameter]) -> None:
        """Creates the average. parameters: key -> parameter of this rank's model."""
        self.optimizer = optimizer
        self._parameters = dict(parameters)
        self._weights: dict[Tensor, Tensor] = {}

    def owners(self) -> list[Tensor]:
        """Returns the tensors that the optimizer of this rank updates."""
        assigned = getattr(inner_optimizer(self.optimizer), "assigned", {})
        found: dict[Tensor, None] = {}
        for ref in shard_refs(self.optimizer, self._parameters, data_rank=0):
            if ref.parameter in assigned:
                full = assigned[ref.parameter].full
                found |= {} if full is None else {full: None}
            else:
                found[ref.owner] = None
        return list(found)

    @contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """Gives the model the average within the context, and its own weights after it, bit by bit. Collective."""
        self._weights = {owner: owner.detach().clone() for owner in self.owners()}
        try:
            for owner in self._weights:
                owner.detach().copy_(self.average(owner))
            publish(self.optimizer)
            yield
        finally:
            with torch.no_grad():
                for owner, own in self._weights.items():
                    owner.detach().copy_(own)
                publish(self.optimizer)
            self._weights = {}

    def before_step(self) -> None:  # noqa: B027
        """Precedes the forward pass of a step."""

    @abstractmethod
    def average(self, owner: Tensor) -> Tensor:
        """Returns the average of a tensor that the optimizer updates."""

    @abstractmethod
    def stored(self, owner: Tensor) -> Tensor | None:
        """Returns the tensor that a checkpoint has beside the optimizer's state; None for none."""

    @abstractmethod
    def restored(self, owner: Tensor) -> Tensor:
        """Returns the tensor into which the stored values are read."""

    def after_step(self, skipped: Tensor) -> None:  # noqa: B027
        """Follows an update. skipped: whether it was left out, bool."""

    def after_load(self) -> None:  # noqa: B027
        """Follows the reading of optimizer state; collective."""

    def numbers(self) -> dict[str, float]:
        """Returns numbers that a checkpoint needs."""
        return {}

    def load_numbers(self, stored: Mapping[str, float]) -> None:  # noqa: B027
        """Restores `numbers`."""


class MovingAverage(WeightAverage):
    """Exponential moving average: after each update, average = decay x average + (1 - decay) x weights."""

    name = EMA
    replaces_weights = False

    def __init__(self, optimizer: Any, parameters: Mapping[str, Parameter], decay: float) -> None:
        """Creates the average, which starts at the weights before the first update. decay: in (0, 1)."""
        super().__init__(optimizer, parameters)
        self._decay = decay
        self._averages: dict[Tensor, Tensor] = {}

    def before_step(self) -> None:
        """Starts the average where there is none."""
        for owner in self.owners() if not self._averages else ():
            self.restored(owner)

    @torch.no_grad()
    def after_step(self, skipped: Tensor) -> None:
        for owner, average in self._averages.items():
            weight = torch.where(skipped.to(owner.device), 0.0, 1.0 - self._decay).to(owner.dtype)
            average.lerp_(owner.detach(), weight)

    def average(self, owner: Tensor) -> Tensor:
        return self.restored(owner)

    def stored(self, owner: Tensor) -> Tensor | None:
        return self.restored(owner)

    def restored(self, owner: Tensor) -> Tensor:
        if owner not in self._averages:
            self._averages[owner] = owner.detach().clone()
        return self._averages[owner]


class ScheduleFreeAverage(WeightAverage):
    """The average x of a schedule-free optimizer, which has the iterate z. Training has
    the weights y between the two.

    Checkpoints have x as the model's weights, and y beside z in the optimizer's state.
    """

    name = TRAINED
    replaces_weights = True

    def average(self, owner: Tensor) -> Tensor:
        return self._inner.average(owner)

    def stored(self, owner: Tensor) -> Tensor | None:
        """Returns y within `swapped`, where a checkpoint is saved."""
        return self._weights.get(owner)

    def restored(self, owner: Tensor) -> Tensor:
        return owner.detach()

    def after_load(self) -> None:
        publish(self.optimizer)

    def numbers(self) -> dict[str, float]:
        return self._inner.numbers()

    def load_numbers(self, stored: Mapping[str, float]) -> None:
        self._inner.load_numbers(stored)

    @property
    def _inner(self) -> AveragingOptimizer:
        inner = inner_optimizer(self.optimizer)
        assert isinstance(inner, AveragingOptimizer)
        return inner


def weight_average(
    optimizer: Any, parameters: Mapping[str, Parameter], ema_decay: float | None
) -> WeightAverage | None:
    """Returns the average of a run, or None.

    Args:
        optimizer: DeepSpeed's or torch's.
        parameters: Key -> parameter of this rank's model.
        ema_decay: Decay of an exponential moving average; None for none.
    """
    if isinstance(inner_optimizer(optimizer), AveragingOptimizer):
        return ScheduleFreeAverage(optimizer, parameters)
    return None if ema_decay is None else MovingAverage(optimizer, parameters, ema_decay)
