"""Locates the first layer, rank and samples of a non-finite or spiking step.

The step's update has not been applied, so its batch is replayed with a hook at every layer. On a GPU one later step
may have been made by then, whose update the replay sees. Dropout is off in that pass. If it is finite, the backward
pass or a dropout mask caused the failure.
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


class InspectedEngine(TrainingEngine, Protocol):
    """An engine whose layers can be inspected."""

    @property
    def topology(self) -> Topology: ...

    @property
    def parameters(self) -> dict[str, Parameter]: ...

    def layers(self) -> dict[int, Module]: ...


@dataclass
class _Observed:
    """What one rank observed in a replay."""

    wrong: list[tuple[int, int]] = field(default_factory=list)
    """(micro batch, layer) with an output that is not finite."""
    largest: dict[int, float] = field(default_factory=dict)
    """Largest output of each layer."""
    micro_batch: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FailureLocator:
    """Replays steps and reports what it observed. All methods are collective."""

    engine: InspectedEngine
    """Runs the forward passes."""
    train: BatchLoader
    """Training batches."""
    micro_batch: int
    """Samples of one pass of a rank."""

    def locate_nonfinite(self, consumed_samples: int, size: StepSize) -> str:
        """Returns one sentence about the non-finite step of that size after so many samples."""
        seen, losses = self._replay(consumed_samples, size)
        last = consumed_samples + size.samples - 1
        batch = f"samples {consumed_samples} to {last} of the training data"
        first = self._first_nonfinite(seen)
        if first is None:
            damaged = sorted(key for key, value in self.engine.parameters.items() if not _finite(value))
            damaged_ranks = [(rank, keys) for rank, keys in enumerate(all_gather_list(damaged)) if keys]
            if damaged_ranks:
                rank, keys = damaged_ranks[0]
                return f"{batch}; the weights are not finite, such as {keys[0]} on rank {rank}"
            return f"{batch}; the pass without dropout is finite ({_format_losses(losses)}), so the gradients are not"
        micro, layer, rank, data_rank = first
        begin = consumed_samples + micro * (size.samples // size.micro_batches) + data_rank * self.micro_batch
        return (
            f"{batch}; first in layer {layer} on rank {rank}, in samples {begin} to {begin + self.micro_batch - 1} "
            f"(micro batch {micro})"
        )

    def locate_spike(self, consumed_samples: int, size: StepSize) -> str:
        """Returns the micro batch with the largest loss now, and the layer with the largest output."""
        seen, losses = self._replay(consumed_samples, size)
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

    def _replay(self, consumed_samples: int, size: StepSize) -> tuple[_Observed, list[float]]:
        """Returns what this rank observed in that step's forward passes, and the loss of each micro batch."""
        seen = _Observed()
        batches = size.truncate(self.train.batches(consumed_samples))
        with _observe(self.engine.layers(), seen):
            losses = [eval_loss(self.engine, batches, 1) for _ in range(size.micro_batches)]
        return seen, losses

    def _first_nonfinite(self, seen: _Observed) -> tuple[int, int, int, int] | None:
        """Returns (micro batch, layer, rank, data rank) that comes first in the model's order, over all ranks."""
        mine = min(seen.wrong, default=None)
        own = None if mine is None else (*mine, self.engine.topology.rank, self.engine.topology.data.rank)
        found = [one for one in all_gather_list(own) if one is not None]
        return min(found, default=None)


@contextmanager
def _observe(layers: dict[int, Module], seen: _Observed) -> Iterator[None]:
    handles = [layer.register_forward_hook(_hook(index, seen)) for index, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(index: int, seen: _Observed) -> Any:
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
