"""Norms and shares of zeros of single parameters, or of layers, in every layout.

Gradients are looked at where they are whole in one sense everywhere: summed, unscaled and about to be used, at the
start of the optimizer's step. ZeRO has made flat pieces of them by then; `pieces` of optimizer_state.py tells whose
they are, and each element is looked at by one rank. Values are sums until all ranks' are added up, which happens only
when asked. Clipping has already scaled the gradients, which is undone here.
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
from megatron.engine.optimizer_state import Piece, inner_optimizer, pieces
from megatron.optim.grad_clip import GradientClipper


class Watched(Protocol):
    """What this room's engines offer to those who watch them."""

    deepspeed: Any
    topology: Topology
    clipper: GradientClipper | None

    def owned(self) -> dict[str, Parameter]: ...

    def optimizer_slices(self) -> list[OptimizerShard]: ...


@dataclass(frozen=True)
class Wanted:
    """What is measured. by_layer: a value a layer in place of one a parameter."""

    gradient_norms: bool = False
    gradient_zeros: bool = False
    parameter_norms: bool = False
    optimizer_states: bool = False
    by_layer: bool = False

    @property
    def anything(self) -> bool:
        return self.gradient_norms or self.gradient_zeros or self.parameter_norms or self.optimizer_states

    def group(self, key: str) -> str:
        """The name under which a parameter's values are reported."""
        return f"layer_{key.partition('.')[0]}" if self.by_layer else key


@dataclass
class Sums:
    """Named sums of this rank: squares, zeros, elements."""

    values: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor, factor: float = 1.0) -> None:
        """Adds a tensor's elements, times a factor."""
        flat = tensor.detach().float()
        square = flat.square().sum(dtype=torch.float64) * factor**2
        zeros = (flat == 0).sum(dtype=torch.float64)
        found = [square, zeros, torch.full_like(square, flat.numel())]
        before = self.values.get(name)
        self.values[name] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]

    def total(self) -> dict[str, tuple[float, float, float]]:
        """The sums over all ranks, by name in order; collective."""
        own = {name: tuple(float(part) for part in parts) for name, parts in self.values.items()}
        added: dict[str, tuple[float, float, float]] = {}
        for part in all_gather_list(own):
            for name, found in part.items():
                before = added.get(name, (0.0, 0.0, 0.0))
                added[name] = tuple(a + b for a, b in zip(before, found, strict=True))  # type: ignore[assignment]
        return dict(sorted(added.items()))


class GradientTap:
    """Calls listeners with every piece of gradient that this rank answers for, at each optimizer step.

    A listener takes (key, piece, gradient as it is used, factor to the gradient before clipping).
    """

    def __init__(self, engine: Watched, max_norm: float) -> None:
        self._engine, self._max_norm = engine, max_norm
        self.pieces = _counted_here(engine)  # now: during a step ZeRO shows one group of parameters only
        self.listeners: list[Callable[[str, Piece, Tensor, float], None]] = []
        inner_optimizer(engine.deepspeed.optimizer).register_step_pre_hook(lambda *_: self._look())

    def _look(self) -> None:
        if not self.listeners:
            return
        factor = None
        for piece in self.pieces:
            if piece.owner.grad is None:
                continue
            factor = self._unclipped() if factor is None else factor
            gradient = piece.owner.grad.reshape(-1).narrow(0, piece.offset, piece.stop - piece.start)
            for listener in self.listeners:
                listener(piece.key, piece, gradient, factor)

    def _unclipped(self) -> float:
        """What the gradients were multiplied by is 1 / this."""
        clipper = self._engine.clipper
        if clipper is not None:
            return 1.0 / float(clipper.factor)
        norm = getattr(
            self._engine.deepspeed.optimizer, "_global_grad_norm", None
        )  # the engine learns it after the step
        if norm is None or self._max_norm <= 0 or not math.isfinite(float(norm)):
            return 1.0
        return max(1.0, (float(norm) + 1e-6) / self._max_norm)


class Statistics:
    """Measures what is wanted of the steps around which `recording` is entered with due true."""

    def __init__(self, engine: Watched, tap: GradientTap, wanted: Wanted) -> None:
        self._engine, self._tap, self._wanted = engine, tap, wanted
        self._gradients = Sums()

    @contextmanager
    def recording(self, due: bool) -> Iterator[None]:
        """Around a step. due: its gradients are to be measured."""
        if not due or not (self._wanted.gradient_norms or self._wanted.gradient_zeros):
            yield
            return
        self._gradients = Sums()
        self._tap.listeners.append(self._add)
        try:
            yield
        finally:
            self._tap.listeners.remove(self._add)

    def measure(self) -> dict[str, float]:
        """Metrics of the last recorded step and of the state now; collective."""
        wanted, metrics = self._wanted, {}
        if wanted.gradient_norms or wanted.gradient_zeros:
            for name, (square, zeros, count) in self._gradients.total().items():
                if wanted.gradient_norms:
                    metrics[f"gradient_norms/{name}"] = math.sqrt(square) if square >= 0 else square
                if wanted.gradient_zeros:
                    metrics[f"gradient_zeros/{name}"] = 100.0 * zeros / count
        if wanted.parameter_norms:
            metrics |= _norms("parameter_norms", self._parameters())
        if wanted.optimizer_states:
            metrics |= _norms("optimizer_state_norms", self._states())
        return metrics

    def _add(self, key: str, piece: Piece, gradient: Tensor, factor: float) -> None:
        self._gradients.add(self._wanted.group(key), gradient, factor)

    def _parameters(self) -> Sums:
        sums = Sums()
        for piece in self._tap.pieces:
            sums.add(self._wanted.group(piece.key), piece.of(piece.owner.detach()))
        return sums

    def _states(self) -> Sums:
        sums, owned, first = Sums(), self._engine.owned(), self._engine.topology.model.is_first
        for part in self._engine.optimizer_slices():
            if not (first or is_sharded(owned[part.key]) or part.model_rank is not None):
                continue
            for name, value in _named(part):
                sums.add(f"{self._wanted.group(part.key)}.{name}", value)
        return sums


def _counted_here(engine: Watched) -> list[Piece]:
    """The pieces whose elements this rank counts."""
    topology = engine.topology
    found = pieces(engine.deepspeed.optimizer, engine.owned(), topology.dp_cp.rank)
    return [piece for piece in found if topology.model.is_first or is_sharded(piece.parameter)]


def _named(part: OptimizerShard) -> Iterable[tuple[str, Tensor]]:
    found = {**part.tensors, **part.tensor_level}
    return ((name, value) for name, value in found.items() if name != MASTER)


def _norms(family: str, sums: Sums) -> dict[str, float]:
    return {f"{family}/{name}": math.sqrt(square) for name, (square, _, _) in sums.total().items()}


class NoiseScale:
    """The gradient noise scale B = tr(covariance) / |gradient|^2 [samples] (arXiv:1812.06162, appendix A.1).

    Gradients of single steps are compared with the mean of `batches` of them; both sides of the quotient are averaged
    over time, since neither is unbiased in a quotient. on_cpu: the sum of gradients is kept in the host's memory.
    """

    DECAY = 0.99

    def __init__(self, tap: GradientTap, *, batches: int, on_cpu: bool) -> None:
        self._tap, self._batches, self._on_cpu = tap, batches, on_cpu
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._square: Tensor | None = None
        self._squares = 0.0
        self._samples: list[int] = []
        self._averages, self._weight = [0.0, 0.0], 0.0

    @contextmanager
    def recording(self, samples: int) -> Iterator[None]:
        """Around a step over so many samples; collective at every `batches`-th."""
        self._square = None
        self._tap.listeners.append(self._add)
        try:
            yield
        finally:
            self._tap.listeners.remove(self._add)
        seen = torch.zeros(1, dtype=torch.float64) if self._square is None else self._square.cpu().view(1)
        self._squares += float(seen)
        self._samples.append(samples)
        if len(self._samples) == self._batches:
            self._estimate()

    def measure(self) -> dict[str, float]:
        """The estimate so far; nothing before the first."""
        noise, signal = self._averages
        if self._weight == 0.0 or signal == 0.0:
            return {}
        return {"train/gradient_noise_scale": noise / signal}

    def _add(self, key: str, piece: Piece, gradient: Tensor, factor: float) -> None:
        gradient = gradient.detach().float() * factor
        square = gradient.square().sum(dtype=torch.float64)
        self._square = square if self._square is None else self._square + square
        kept = gradient.cpu() if self._on_cpu else gradient
        place = (key, piece.start)
        self._sums[place] = self._sums[place] + kept if place in self._sums else kept.clone()

    def _estimate(self) -> None:
        large = sum((one.square().sum(dtype=torch.float64).cpu() for one in self._sums.values()), torch.zeros(()))
        sums = torch.tensor([self._squares / self._batches, float(large) / self._batches**2], dtype=torch.float64)
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
