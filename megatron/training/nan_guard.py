"""What becomes of a step whose loss or gradient is not finite, or whose loss leaps.

Such an update is never applied, on any rank; `on_nan` says whether the run stops there or leaves the batch out. At a
low precision with loss scaling a gradient that overflows is part of the method, and says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron.engine.engine import StepResult
from megatron.errors import RunError
from megatron.training.locate_failure import Diagnosis
from megatron.training.run_state import RunState
from megatron.training.step_schedule import StepSize

STOP = "stop"
WEIGHT = 0.05  # of the newest loss in the running mean
STEPS_BEFORE = 10  # steps that the running mean needs before a leap can be told


@dataclass
class Judge:
    """on_nan: stop or skip. spike_factor: how far above the running mean a loss is told; None tells none.

    scaled: whether the loss is scaled (fp16). tell: speaks to the user.
    """

    diagnosis: Diagnosis
    on_nan: str
    spike_factor: float | None
    scaled: bool
    tell: Callable[[str], None]
    _mean: float = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)

    def judge(self, state: RunState, size: StepSize, result: StepResult) -> None:
        """Looks at the step that follows on `state`; collective. RunError where the run is to stop."""
        loss = float(result.loss)
        iteration = state.iteration + 1
        if math.isfinite(loss) and (self.scaled or not result.skipped):
            self._look_for_a_leap(iteration, loss, state, size)
            return
        location = self.diagnosis.of(state.consumed_samples, size)
        what = f"the loss of iteration {iteration} is {loss}, the gradient's norm {float(result.grad_norm)}: {location}"
        if self.on_nan == STOP:
            raise RunError.of(
                what,
                location="training",
                hint="go on from an earlier checkpoint with --iteration N and a lower learning rate, or leave such "
                "batches out with on_nan: skip",
            )
        self.tell(f"{what}; the step is left out")

    def _look_for_a_leap(self, iteration: int, loss: float, state: RunState, size: StepSize) -> None:
        if self.spike_factor is not None and self._steps >= STEPS_BEFORE and loss > self.spike_factor * self._mean:
            location = self.diagnosis.of_spike(state.consumed_samples, size)
            self.tell(f"the loss of iteration {iteration} leaps to {loss:.4f} from {self._mean:.4f}: {location}")
            return
        weight = max(WEIGHT, 1 / (self._steps + 1))
        self._mean += weight * (loss - self._mean)
        self._steps += 1
