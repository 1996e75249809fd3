"""Base class of training engines: the step, the optimizer's state and caches.

s sequence, b micro batch, v vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron.checkpoint.format.optimizer_shards import OptimizerShard, OptimizerState
from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.mesh import Topology
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.engine import optimizer_state
from megatron.engine.engine import StepResult, TrainingEngine, as_tensor, loss_scale
from megatron.engine.expert_bias import correction_biases, counting_layers, update_biases
from megatron.engine.frozen_base import FrozenWeight
from megatron.engine.outlier_steps import OutlierSteps
from megatron.engine.weight_average import WeightAverage
from megatron.model.kv_cache import KVCache
from megatron.model.loss_parts import LossParts
from megatron.model.moe.layer import MoELayer
from megatron.model.moe.losses import RouterLossTracker
from megatron.optim.grad_clip import StepValues
from megatron.optim.param_groups import set_learning_rate


@dataclass(kw_only=True)
class BaseEngine(TrainingEngine, ABC):
    """A DeepSpeed engine with the parameters and objects of a training step. engine.py documents the methods."""

    deepspeed: Any
    """DeepSpeedEngine or PipelineEngine."""
    topology: Topology
    """Axes of this rank."""
    parameters: dict[str, Parameter]
    """Key -> parameter of this rank, in the order of the parameter table."""
    make_cache: Callable[[int, int], KVCache]
    """(batch, max length) -> an empty cache."""
    random: TensorParallelRNG
    """Generator for random numbers on sharded tensors."""
    clipper: StepValues | None
    """Computes the gradient norm and clips, without reads by the host; None where DeepSpeed does."""
    router_losses: RouterLossTracker | None = None
    """Present where blocks have experts."""
    loss_parts: LossParts | None = None
    """Present where the loss has parts besides that of tokens."""
    prompt: int = 0
    """Vectors of a soft prompt before every sequence."""
    average: WeightAverage | None = None
    """Average of the weights; None where none is asked for."""
    outliers: OutlierSteps | None = None
    """Leaves out updates from losses that are outliers; None leaves none out."""
    learns: Tensor | None = None
    """Whether the last step had a token to learn, bool; None where this rank read none of its samples."""
    stored_base: dict[str, FrozenWeight] = field(default_factory=dict)
    """Key -> frozen weight in few bits, which is no parameter."""
    pipelined: bool = False
    """True if the model is distributed over pipeline stages."""

    def train_step(self, batches: Iterator[MicroBatch], learning_rate: float) -> StepResult:
        engine = self.deepspeed
        set_learning_rate(engine.optimizer.param_groups, learning_rate)
        skipped_before = engine.skipped_steps
        if self.router_losses is not None:
            self.router_losses.scale = loss_scale(engine.optimizer) / engine.gradient_accumulation_steps()
        if self.average is not None:
            self.average.before_step()
        loss = self._run_micro_batches(batches)
        norm = self.clipper.norm if self.clipper else as_tensor(engine.get_global_grad_norm())
        skipped = self.clipper.skipped if self.clipper else torch.tensor(engine.skipped_steps > skipped_before)
        if self.average is not None:
            self.average.after_step(skipped)
        outlier = None if self.outliers is None else self.outliers.end(loss, skipped)
        update_biases(self._counting, skipped)
        scale = loss_scale(engine.optimizer)
        more = self.router_losses.take(self.topology, engine.device) if self.router_losses is not None else {}
        if self.loss_parts is not None:
            parts = self.loss_parts.take(self.topology, engine.device)
            loss, more = loss - self.loss_parts.factor * sum(parts.values()), {**more, **parts}
        clip = getattr(optimizer_state.inner_optimizer(engine.optimizer), "clip", None)
        if clip is not None:
            more = {**more, **clip.measured()}
        return StepResult(loss, norm, learning_rate, scale, skipped, more, self.learns, outlier)

    @cached_property
    def _counting(self) -> list[MoELayer]:
        return counting_layers(self.deepspeed.module)

    @property
    def biases(self) -> dict[str, Tensor]:
        """Key -> correction bias of the routers of this rank."""
        return correction_biases(self.deepspeed.module)

    @abstractmethod
    def _run_micro_batches(self, batches: Iterator[MicroBatch]) -> Tensor:
        """Forward, backward and update over the micro batches of one step; returns its mean loss."""

    def take_loss_parts(self) -> dict[str, float]:
        if self.loss_parts is None:
            return {}
        return {
            name: float(value) for name, value in self.loss_parts.take(self.topology, self.deepspeed.device).items()
        }

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        return self.make_cache(batch, max_length)

    @abstractmethod
    def layers(self) -> dict[int, Module]:
        """Returns the layers of this rank by their index in the model."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Returns key -> tensor-parallel shard of the layers that this rank saves; collective."""

    @abstractmethod
    def owned(self) -> dict[str, Parameter]:
        """Returns key -> parameter that this rank counts and saves; a tied copy is not among them."""

    def saved_weights(self) -> AbstractContextManager[None]:
        """Returns a context in which the model has the weights that checkpoints and evaluations take. Collective."""
        average = self.average
        return average.swapped() if average is not None and average.replaces_weights else nullcontext()

    @property
    def moving_average(self) -> Callable[[], AbstractContextManager[None]] | None:
        """Context in which the model has the moving average of its weights; None without one. Collective."""
        average = self.average
        return None if average is None or average.replaces_weights else average.swapped

    def optimizer_shards(self) -> list[OptimizerShard]:
        return optimizer_state.read(
            self.deepspeed.optimizer, self.owned(), data_rank=self.topology.dp_cp.rank, average=self.average
        )

    def loss_scaling(self) -> dict[str, float]:
        found = optimizer_state.read_scaling(self.deepspeed.optimizer)
        for one in (self.average, self.outliers):
            found |= {} if one is None else one.numbers()
        return found

    def load_loss_scaling(self, stored: Mapping[str, float]) -> None:
        optimizer_state.write_scaling(self.deepspeed.optimizer, stored)
        for one in (self.average, self.outliers):
            if one is not None:
                one.load_numbers(stored)

    def load_optimizer(self, stored: OptimizerState) -> None:
        axis = self.topology.model
        sizes = {"model_rank": axis.rank, "model_size": axis.size}
        optimizer_state.write(self.deepspeed.optimizer, self.parameters, stored, average=self.average, **sizes)
        if self.average is not None:
            self.average.after_load()
