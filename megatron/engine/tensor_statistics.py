"""Norms and fractions of zeros of single parameters, or of layers, in every layout.

Gradients are measured when they are reduced and unscaled, at the start of the optimizer's step. ZeRO has flattened them
by then; `shard_refs` of optimizer_state.py locates each parameter, and each element is measured by one rank. Values are
local sums until metrics are requested, when they are summed over ranks. Clipping has already scaled the gradients,
which is undone here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron.checkpoint.format.optimizer_shards import MASTER, OptimizerShard
from megatron.distributed.mesh import Topology
from megatron.distributed.param_attrs import is_sharded
from megatron.distributed.process_group import all_gather_list
from megatron.engine.optimizer_state import ShardRef, inner_optimizer, shard_refs
from megatron.optim.grad_clip import StepValues


class MeasuredEngine(Protocol):
    """The interface of engines that is needed here."""

    deepspeed: Any
    topology: Topology
    clipper: StepValues | None

    def owned(self) -> dict[str, Parameter]: ...

    def optimizer_shards(self) -> list[OptimizerShard]: ...


@dataclass(frozen=True)
class Measurements:
    """The quantities that are measured."""

    gradient_norms: bool = False
    """Norms of gradients."""
    gradient_zeros: bool = False
    """Fraction of gradient elements that are 0."""
    parameter_norms: bool = False
    """Norms of parameters."""
    optimizer_states: bool = False
    """Norms of optimizer states."""
    by_layer: bool = False
    """One value a layer instead of one a parameter."""

    @property
    def anything(self) -> bool:
        return self.gradient_norms or self.gradient_zeros or self.parameter_norms or self.optimizer_states

    def group(self, key: str) -> str:
        """Returns the name under which a parameter's values are reported."""
        return f"layer_{key.partition('.')[0]}" if self.by_layer else key


@dataclass
class Sums:
    """Named sums of this rank: squares, zeros, elements."""

    values: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor, factor: float | Tensor = 1.0) -> None:
        """Adds a tensor's elements, times a factor."""
        flat = tensor.detach().float()
        square = flat.square().sum(dtype=torch.float64) * factor**2
        zeros = (flat == 0).sum(dtype=torch.float64)
        found = [square, zeros, torch.full_like(square, flat.numel())]
        before = self.values.get(name)
        self.values[name] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]

    def total(self) -> dict[str, tuple[float, float, float]]:
        """Returns the sums over all ranks, by name in order; collective."""
        own = {name: tuple(float(part) for part in parts) for name, parts in self.values.items()}
        added: dict[str, tuple[float, float, float]] = {}
        for part in all_gather_list(own):
            for name, found in part.items():
                before = added.get(name, (0.0, 0.0, 0.0))
                added[name] = tuple(a + b for a, b in zip(before, found, strict=True))  # type: ignore[assignment]
        return dict(sorted(added.items()))


class GradientTap:
    """Calls listeners with every range of gradient that this rank counts, at each optimizer step.

    A listener takes (key, shard ref, gradient as it is used, factor to the gradient before clipping).
    """

    def __init__(self, engine: MeasuredEngine, max_norm: float) -> None:
        self._engine, self._max_norm = engine, max_norm
        self.shard_refs = _counted_here(engine)  # now, since ZeRO shows only one group of parameters during a step
        self.listeners: list[Callable[[str, ShardRef, Tensor, float | Tensor], None]] = []
        inner_optimizer(engine.deepspeed.optimizer).register_step_pre_hook(lambda *_: self._notify())

    def _notify(self) -> None:
        if not self.listeners:
            return
        factor = None
        for ref in self.shard_refs:
            if ref.owner.grad is None:
                continue
            factor = self._unclipped() if factor is None else factor
            gradient = ref.owner.grad.reshape(-1).narrow(0, ref.offset, ref.stop - ref.start)
            for listener in self.listeners:
                listener(ref.key, ref, gradient, factor)

    def _unclipped(self) -> float | Tensor:
        """Returns the factor that undoes clipping."""
        clipper = self._engine.clipper
        if clipper is not None:
            return clipper.unclipped
        norm = getattr(self._engine.deepspeed.optimizer, "_global_grad_norm", None)  # the engine gets it after the step
        if norm is None or self._max_norm <= 0 or not math.isfinite(float(norm)):
            return 1.0
        return max(1.0, (float(norm) + 1e-6) / self._max_norm)


class Statistics:
    """Measures the steps in which `recording` is entered with due true."""

    def __init__(self, engine: MeasuredEngine, tap: GradientTap, measurements: Measurements) -> None:
        self._engine, self._tap, self._measurements = engine, tap, measurements
        self._gradients = Sums()

    @contextmanager
    def recording(self, due: bool) -> Iterator[None]:
        """Context of a step. due: true if its gradients are measured."""
        self._gradients = Sums()
        if not due or not (self._measurements.gradient_norms or self._measurements.gradient_zeros):
            yield
            return
        self._tap.listeners.append(self._add)
        try:
            yield
        finally:
            self._tap.listeners.remove(self._add)

    def measure(self) -> dict[str, float]:
        """Returns metrics of the last step, if it was recorded, and of the current state; collective."""
        measurements, metrics = self._measurements, {}
        if measurements.gradient_norms or measurements.gradient_zeros:
            for name, (square, zeros, count) in self._gradients.total().items():
                if measurements.gradient_norms:
                    metrics[f"gradient_norms/{name}"] = math.sqrt(square) if square >= 0 else square
                if measurements.gradient_zeros:
                    metrics[f"gradient_zeros/{name}"] = 100.0 * zeros / count
        if measurements.parameter_norms:
            metrics |= _norms("parameter_norms", self._parameters())
        if measurements.optimizer_states:
            metrics |= _norms("optimizer_state_norms", self._states())
        return metrics

    def _add(self, key: str, ref: ShardRef, gradient: Tensor, factor: float | Tensor) -> None:
        self._gradients.add(self._measurements.group(key), gradient, factor)

    def _parameters(self) -> Sums:
        sums = Sums()
        for ref in self._tap.shard_refs:
            sums.add(self._measurements.group(ref.key), ref.of(ref.owner.detach()))
        return sums

    def _states(self) -> Sums:
        sums, owned, first = Sums(), self._engine.owned(), self._engine.topology.model.is_first
        for part in self._engine.optimizer_shards():
            if not (first or is_sharded(owned[part.key]) or part.model_rank is not None):
                continue
            for name, value in _named(part):
                sums.add(f"{self._measurements.group(part.key)}.{name}", value)
        return sums


def _counted_here(engine: MeasuredEngine) -> list[ShardRef]:
    """Returns the ranges whose elements this rank counts."""
    topology = engine.topology
    found = shard_refs(engine.deepspeed.optimizer, engine.owned(), topology.dp_cp.rank)
    return [ref for ref in found if ref.in_full or topology.model.is_first or is_sharded(ref.parameter)]


def _named(part: OptimizerShard) -> Iterable[tuple[str, Tensor]]:
    found = {**part.tensors, **part.tensor_level}
    return ((name, value) for name, value in found.items() if name != MASTER)


def _norms(family: str, sums: Sums) -> dict[str, float]:
    return {f"{family}/{name}": math.sqrt(square) for name, (square, _, _) in sums.total().items()}


class NoiseScale:
    """The gradient noise scale B = tr(covariance) / |gradient|^2 [samples] (arXiv:1812.06162, appendix A.1).

    Gradients of single steps are compared with the mean of `batches` of them; both sides of the quotient are averaged
    over time, since neither is unbiased in a quotient.
    """

    DECAY = 0.99

    def __init__(self, tap: GradientTap, *, batches: int, on_cpu: bool) -> None:
        """Creates the estimator.

        Args:
            tap: source of gradients.
            batches: steps of one estimate.
            on_cpu: true to keep the sum of gradients in host memory.
        """
        self._tap, self._batches, self._on_cpu = tap, batches, on_cpu
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._square: Tensor | None = None
        self._squares: float | Tensor = 0.0
        self._samples: list[int] = []
        self._averages, self._weight = [0.0, 0.0], 0.0

    @contextmanager
    def recording(self, samples: int) -> Iterator[None]:
        """Context of a step over so many samples; collective at every `batches`-th."""
        self._square = None
        self._tap.listeners.append(self._add)
        try:
            yield
        finally:
            self._tap.listeners.remove(self._add)
        if self._square is not None:
            self._squares = self._squares + self._square
        self._samples.append(samples)
        if len(self._samples) == self._batches:
            self._estimate()

    def measure(self) -> dict[str, float]:
        """Returns the current estimate; empty before the first."""
        noise, signal = self._averages
        if self._weight == 0.0 or signal == 0.0:
            return {}
        return {"train/gradient_noise_scale": noise / signal}

    def _add(self, key: str, ref: ShardRef, gradient: Tensor, factor: float | Tensor) -> None:
        gradient = gradient.detach().float() * factor
        square = gradient.square().sum(dtype=torch.float64)
        self._square = square if self._square is None else self._square + square
        on_device = gradient.cpu() if self._on_cpu else gradient
        slot = (key, ref.start)
        self._sums[slot] = self._sums[slot] + on_device if slot in self._sums else on_device.clone()

    def _estimate(self) -> None:
        large = sum((one.square().sum(dtype=torch.float64).cpu() for one in self._sums.values()), torch.zeros(()))
        sums = torch.tensor(
            [float(self._squares) / self._batches, float(large) / self._batches**2], dtype=torch.float64
        )
        if dist.is_initialized() and dist.get_world_size() > 1:
            sums = sums.cuda() if dist.get_backend() == "nccl" else sums
            dist.all_reduce(sums)
        small_square, large_square = sums.tolist()
        small = sum(self._samples) / self._batches
        total = small * self._batches
        signal = (total * large_square - small * small_square) / (total - small)
        noise = (small_square - large_square) / (1 / small - 1 / total)
        if math.isfinite(signal) and math.isfinite(noise):
            for index, value in enumerate((noise, signal)):
                self._averages[index] = self.DECAY * self._averages[index] + (1 - self.DECAY) * value
            self._weight = 1.0
        self._sums, self._squares, self._samples = {}, 0.0, []
