"""Values of finished steps on the host, read without making the device wait.

A host that reads a value of the step that it has just issued stops issuing work until the device is done. So on a GPU
a step's loss and flags are read when the next step has been issued: the device has work meanwhile. Before a report, an
evaluation, a checkpoint and the end of a run all are read.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from megatron.distributed.host_copy import HostCopy
from megatron.engine.engine import StepResult
from megatron.training.run_state import RunState
from megatron.training.step_schedule import StepSize


@dataclass(frozen=True)
class StepOutcome:
    """What a finished step was, and what it gave."""

    iteration: int
    """Number of the step, counted from 1."""
    consumed_samples: int
    """Samples before the step."""
    size: StepSize
    """Its samples and sequence length."""
    loss: float
    """Mean over all unmasked tokens of the global batch [nats a token]."""
    grad_norm: float
    """Gradient norm before clipping."""
    loss_scale: float
    """1 unless fp16."""
    skipped: bool
    """True if the update was not applied because gradients were not finite, or the loss was an outlier."""
    outlier: bool = False
    """True if the update was not applied because the loss was an outlier."""


class StepOutcomes:
    """The steps whose values the host has not read yet."""

    def __init__(self, lag: int) -> None:
        """Creates an empty list. lag: newest steps that `take` leaves on the device; 0 on a CPU, 1 on a GPU."""
        self._lag = lag
        self._unread: deque[tuple[RunState, StepSize, float, HostCopy]] = deque()

    def add(self, state: RunState, size: StepSize, result: StepResult) -> None:
        """Adds the step after `state`."""
        before = RunState(state.iteration, state.consumed_samples)
        outlier = torch.zeros_like(result.skipped) if result.outlier is None else result.outlier
        values = HostCopy(result.loss, result.grad_norm, result.skipped, outlier)
        self._unread.append((before, size, result.loss_scale, values))

    def take(self, *, everything: bool) -> list[StepOutcome]:
        """Returns the outcomes of all steps but the newest `lag`, in order; with `everything` of those as well."""
        found = []
        while len(self._unread) > (0 if everything else self._lag):
            before, size, scale, values = self._unread.popleft()
            loss, norm, skipped, outlier = values.read()
            where = (before.iteration + 1, before.consumed_samples)
            found.append(StepOutcome(*where, size, loss, norm, scale, bool(skipped), bool(outlier)))
        return found
