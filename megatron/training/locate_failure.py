"""Where a step went wrong: the first layer that is not finite, on which rank, and in which samples.

The step's update has not been applied, so its batch can be run through the model again, this time with a hook at every
layer. Dropout is off in that pass. What is finite there went wrong in the backward pass, or in what dropout drew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron.data.dataset.loader import BatchLoader
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import all_gather_list
from megatron.engine.engine import TrainingEngine, eval_loss
from megatron.training.step_schedule import StepSize


class Examined(TrainingEngine, Protocol):
    """An engine whose layers can be looked at."""

    @property
    def topology(self) -> Topology: ...

    @property
    def parameters(self) -> dict[str, Parameter]: ...

    def layers(self) -> dict[int, Module]: ...


@dataclass
class _Seen:
    """What one rank saw: (micro batch, layer) where its output was not finite, and the largest output of each layer."""

    wrong: list[tuple[int, int]] = field(default_factory=list)
    largest: dict[int, float] = field(default_factory=dict)
    micro_batch: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FailureLocator:
    """Runs steps again and says what it sees. All methods are collective.

    micro_batch: samples of one pass of a rank.
    """

    engine: Examined
    train: BatchLoader
    micro_batch: int

    def locate_nonfinite(self, consumed_samples: int, size: StepSize) -> str:
        """One sentence about the step of that size that followed on so many samples."""
        seen, losses = self._again(consumed_samples, size)
        last = consumed_samples + size.samples - 1
        batch = f"samples {consumed_samples} to {last} of the training data"
        first = self._first(seen)
        if first is None:
            damaged = sorted(key for key, value in self.engine.parameters.items() if not _finite(value))
            places = [(rank, keys) for rank, keys in enumerate(all_gather_list(damaged)) if keys]
            if places:
                rank, keys = places[0]
                return f"{batch}; the weights are not finite, such as {keys[0]} on rank {rank}"
            return f"{batch}; the pass without dropout is finite ({_format_losses(losses)}), so the gradients are not"
        micro, layer, rank, data_rank = first
        begin = consumed_samples + micro * (size.samples // size.micro_batches) + data_rank * self.micro_batch
        return (
            f"{batch}; first in layer {layer} on rank {rank}, in samples {begin} to {begin + self.micro_batch - 1} "
            f"(micro batch {micro})"
        )

    def locate_spike(self, consumed_samples: int, size: StepSize) -> str:
        """The micro batch with the greatest loss now, and the layer with the greatest output."""
        seen, losses = self._again(consumed_samples, size)
        share = size.samples // size.micro_batches
        worst = max(range(len(losses)), key=losses.__getitem__)
        begin = consumed_samples + worst * share
        peaks = [
            (value, layer, rank)
            for rank, one in enumerate(all_gather_list(seen.largest))
            for layer, value in one.items()
        ]
        value, layer, rank = max(peaks, default=(0.0, 0, 0))
        return (
            f"samples {begin} to {begin + share - 1} have the greatest loss of the batch, {losses[worst]:.4f}; the "
            f"largest activation is {value:.4g}, in layer {layer} on rank {rank}"
        )

    def _again(self, consumed_samples: int, size: StepSize) -> tuple[_Seen, list[float]]:
        """What this rank sees of that step's forward passes, and the loss of each micro batch."""
        seen = _Seen()
        batches = size.of(self.train.batches(consumed_samples))
        with _watching(self.engine.layers(), seen):
            losses = [eval_loss(self.engine, batches, 1) for _ in range(size.micro_batches)]
        return seen, losses

    def _first(self, seen: _Seen) -> tuple[int, int, int, int] | None:
        """(micro batch, layer, rank, data rank) that comes first in the model's order, over all ranks."""
        mine = min(seen.wrong, default=None)
        own = None if mine is None else (*mine, self.engine.topology.rank, self.engine.topology.data.rank)
        found = [one for one in all_gather_list(own) if one is not None]
        return min(found, default=None)


@contextmanager
def _watching(layers: dict[int, Module], seen: _Seen) -> Iterator[None]:
    handles = [layer.register_forward_hook(_hook(index, seen)) for index, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(index: int, seen: _Seen) -> Any:
    def look(module: Module, inputs: Any, output: Any) -> None:
        number = seen.micro_batch.get(index, 0)
        seen.micro_batch[index] = number + 1
        for tensor in output if isinstance(output, tuple) else (output,):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.numel():
                continue
            if not _finite(tensor):
                seen.wrong.append((number, index))
            else:
                seen.largest[index] = max(seen.largest.get(index, 0.0), float(tensor.detach().abs().max()))

    return look


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(getattr(tensor, "ds_tensor", tensor).detach()).all())


def _format_losses(losses: list[float]) -> str:
    return "loss " + ", ".join(f"{loss:.4f}" for loss in losses[:4])
