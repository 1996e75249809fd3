"""Policy for non-finite steps and loss spikes.

An update with a non-finite loss or gradient is never applied, on any rank; `on_nan` decides whether the run stops or
skips the batch. On a GPU the host learns of a step when the next one has been issued. With loss
scaling (fp16) an overflowing gradient is expected and is not reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron.errors import RunError
from megatron.training.hooks.base import Hook
from megatron.training.locate_failure import FailureLocator
from megatron.training.step_outcomes import StepOutcome

STOP = "stop"
WEIGHT = 0.05  # of the newest loss in the running mean
WARMUP_STEPS = 10  # steps in the running mean before a spike can be detected


@dataclass
class LossGuard(Hook):
    """Stops the run or skips the batch at a non-finite step, and reports loss spikes."""

    locator: FailureLocator
    """Finds the layer of a non-finite value."""
    on_nan: str
    """`stop` or `skip`."""
    spike_factor: float | None
    """Multiple of the running mean above which a loss is a spike; None reports none."""
    scaled: bool
    """True with loss scaling (fp16)."""
    log: Callable[[str], None]
    """Prints a line."""
    _mean: float = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)

    def outcome(self, outcome: StepOutcome) -> None:
        """Checks a step; collective. Raises RunError where the run must stop."""
        if outcome.outlier:
            location = self.locator.locate_spike(outcome.consumed_samples, outcome.size)
            what = f"the loss of iteration {outcome.iteration} is an outlier, {outcome.loss:.4f}: {location}"
            self.log(f"{what}; the step is left out")
            return
        if math.isfinite(outcome.loss) and (self.scaled or not outcome.skipped):
            self._check_spike(outcome)
            return
        location = self.locator.locate_nonfinite(outcome.consumed_samples, outcome.size)
        what = (
            f"the loss of iteration {outcome.iteration} is {outcome.loss}, the gradient's norm {outcome.grad_norm}: "
            f"{location}"
        )
        if self.on_nan == STOP:
            raise RunError.of(
                what,
                location="training",
                hint="go on from an earlier checkpoint with --iteration N and a lower learning rate, or leave such "
                "batches out with on_nan: skip",
            )
        self.log(f"{what}; the step is left out")

    def _check_spike(self, outcome: StepOutcome) -> None:
        loss = outcome.loss
        if loss == 0.0:  # of a batch without a token to learn; the value is the same on all ranks
            return
        if self.spike_factor is not None and self._steps >= WARMUP_STEPS and loss > self.spike_factor * self._mean:
            location = self.locator.locate_spike(outcome.consumed_samples, outcome.size)
            self.log(
                f"loss spike at iteration {outcome.iteration}: {loss:.4f} (running mean {self._mean:.4f}): {location}"
            )
            return
        weight = max(WEIGHT, 1 / (self._steps + 1))
        self._mean += weight * (loss - self._mean)
        self._steps += 1
