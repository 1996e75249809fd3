"""Hooks that measure tensors: norms of gradients, parameters and optimizer states, the gradient noise scale."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from megatron.config.schema.observe import ObserveSection
from megatron.engine.base import BaseEngine
from megatron.engine.optimizer_state import inner_optimizer
from megatron.engine.tensor_statistics import GradientTap, Measurements, NoiseScale, Statistics
from megatron.optim.onebit import OnebitAdam
from megatron.training.hooks.base import Hook
from megatron.training.step_schedule import StepSize


class CommBytesHook(Hook):
    """Reports the bytes that 1-bit Adam communicates."""

    def __init__(self, optimizer: OnebitAdam) -> None:
        self._optimizer = optimizer

    def metrics(self) -> dict[str, float]:
        return self._optimizer.comm_bytes.measure()


class StatisticsHook(Hook):
    """Measures the tensors of reported steps."""

    def __init__(self, statistics: Statistics, due: Callable[[int], bool]) -> None:
        self._statistics, self._due = statistics, due

    def around_step(self, iteration: int, size: StepSize) -> AbstractContextManager[None]:
        return self._statistics.recording(self._due(iteration))

    def metrics(self) -> dict[str, float]:
        return self._statistics.measure()


class NoiseScaleHook(Hook):
    """Measures the gradient noise scale of every step."""

    def __init__(self, noise: NoiseScale) -> None:
        self._noise = noise

    def around_step(self, iteration: int, size: StepSize) -> AbstractContextManager[None]:
        return self._noise.recording(size.samples)

    def metrics(self) -> dict[str, float]:
        return self._noise.measure()


def statistics_hooks(
    observe: ObserveSection, engine: BaseEngine, *, max_norm: float, due: Callable[[int], bool]
) -> list[Hook]:
    """Returns the measurements that the section enables.

    Args:
        observe: section of the configuration.
        engine: engine whose tensors are measured.
        max_norm: limit of gradient clipping.
        due: true for iterations that are reported.
    """
    hooks: list[Hook] = []
    optimizer = inner_optimizer(engine.deepspeed.optimizer)
    if isinstance(optimizer, OnebitAdam):
        hooks.append(CommBytesHook(optimizer))
    measurements = Measurements(
        gradient_norms=observe.log_grad_norm,
        gradient_zeros=observe.log_grad_pct_zeros,
        parameter_norms=observe.log_param_norm,
        optimizer_states=observe.log_optimizer_states,
        by_layer=observe.log_norms_by == "layer",
    )
    if not measurements.anything and not observe.log_gradient_noise_scale:
        return hooks
    tap = GradientTap(engine, max_norm)
    if measurements.anything:
        hooks.append(StatisticsHook(Statistics(engine, tap, measurements), due))
    if observe.log_gradient_noise_scale:
        batches, on_cpu = observe.gradient_noise_scale_n_batches, observe.gradient_noise_scale_cpu_offload
        hooks.append(NoiseScaleHook(NoiseScale(tap, batches=batches, on_cpu=on_cpu)))
    return hooks
