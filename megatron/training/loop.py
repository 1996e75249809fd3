"""The training loop: step, count, report, save, evaluate, stop.

The loop gets every object from trainer.py. One step runs through five files: this one, `engine/base.py` (the step),
`engine/loss_normalization.py` (the divisor of the loss), `optim/grad_clip.py` (norm and clipping at ZeRO 0) and
`loss_guard.py` (non-finite steps and loss spikes). Everything that observes the loop is a hook (`hooks/base.py`).
On a GPU the host waits for a step that it has just issued only where its values are needed (`step_outcomes.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.distributed.process_group import LaterAnyRank, any_rank
from megatron.engine.engine import StepResult
from megatron.errors import RunError
from megatron.metrics.step_metrics import step_metrics
from megatron.metrics.timers import StepClock
from megatron.model.loss_parts import FURTHER
from megatron.training import intervals
from megatron.training.loop_context import LoopContext, TrainSchedule
from megatron.training.run_state import RunState
from megatron.training.step_outcomes import StepOutcome, StepOutcomes
from megatron.training.step_schedule import StepSize
from megatron.training.validation import evaluate


def run_loop(schedule: TrainSchedule, context: LoopContext, state: RunState) -> str | None:
    """Trains up to the last iteration, or until asked to stop; returns why it stopped early.

    The last state is saved in either case. Raises RunError where a hook does.
    """
    hooks = context.hooks
    read = hooks.batches(context.train, "train", state.consumed_samples) if context.train is not None else iter(())
    batches = map(context.to_device, read)
    window = _Window(StepClock(context.synchronize))
    settling = _Settling(context, state, _Overflows(schedule.overflow_limit))
    stops = LaterAnyRank() if context.outcome_lag else any_rank
    saved_at = state.iteration
    reason = None
    hooks.on_run_start(state)
    if context.save is not None and state.iteration == 0 and _save_due(schedule, state):
        _save(context, state)
    if _starts_with_evaluation(schedule, context, state):
        with window.clock.excluded():
            reason = _evaluate(schedule, context, state)
    while state.iteration < schedule.total and reason is None:
        size = schedule.sizes.at(state.iteration, state.consumed_samples)
        context.engine.prepare(size.micro_batches, size.length)
        with hooks.step(state.iteration + 1, size):
            lr = context.lr_schedule.lr(_lr_step(schedule, state, size))
            result = context.engine.train_step(size.truncate(batches), lr)
        settling.add(size, result)
        window.add(result, size)
        if _values_due(schedule, context, state):
            settling.finish()
        if schedule.reports(state.iteration):
            _report(schedule, context, state, window)
        else:
            context.reporter.progress(state.iteration)
        if context.save is not None and (_ends_here(schedule, state) or _save_due(schedule, state)):
            settling.finish()
            with window.clock.excluded():
                _save(context, state)
            saved_at = state.iteration
        if _evaluation_due(schedule, context, state):
            with window.clock.excluded():
                reason = _evaluate(schedule, context, state)
        context.check_saves()
        reason = reason or _reason_to_stop(schedule, context, state, stops)
    settling.finish()
    if window.sizes:
        _report(schedule, context, state, window)  # a stop between two reports
    if context.save is not None and saved_at != state.iteration:
        _save(context, state)
    hooks.on_run_end(state)
    return reason


def _save(context: LoopContext, state: RunState) -> None:
    assert context.save is not None
    with context.hooks.save(state):
        context.save(state)


def _evaluate(schedule: TrainSchedule, context: LoopContext, state: RunState) -> str | None:
    """Evaluates; returns the reason to stop where that ended the evaluation early, on all ranks."""
    if not evaluate(schedule, context, state):
        return "a signal asked for it" if state.iteration < schedule.total else None
    if context.evaluated is not None:
        context.evaluated.complete(state.iteration)
    return None


class _Settling:
    """Counts steps, and gives their values to the hooks once the host may read them."""

    def __init__(self, context: LoopContext, state: RunState, overflows: _Overflows) -> None:
        self._hooks, self._state, self._overflows = context.hooks, state, overflows
        self._outcomes = StepOutcomes(context.outcome_lag)

    def add(self, size: StepSize, result: StepResult) -> None:
        """Counts a step that was issued, and settles those before whose values are due."""
        self._hooks.after_step(self._state, size, result)
        self._outcomes.add(self._state, size, result)
        self._state.advance(samples=size.samples, tokens=size.tokens)
        self._settle(everything=False)

    def finish(self) -> None:
        """Settles all steps; waits for the device."""
        self._settle(everything=True)

    def _settle(self, *, everything: bool) -> None:
        """Raises RunError where the run must end."""
        for outcome in self._outcomes.take(everything=everything):
            self._hooks.outcome(outcome)
            self._state.skipped += int(outcome.skipped)
            self._overflows.add(outcome)


@dataclass
class _Overflows:
    """Steps in a row that were skipped although the loss scale fell no further."""

    limit: int
    count: int = 0
    scale: float = float("inf")

    def add(self, outcome: StepOutcome) -> None:
        """Counts a step. RunError at the limit."""
        stuck = outcome.skipped and outcome.loss_scale >= self.scale
        self.count = self.count + 1 if stuck else 0
        self.scale = outcome.loss_scale
        if self.count >= self.limit:
            raise RunError.of(
                f"gradients overflowed {self.count} times in a row at the least loss scale, {self.scale:g}, up to "
                f"iteration {outcome.iteration}",
                location="training",
                hint="go on from an earlier checkpoint with a lower learning rate, or in bfloat16",
            )


@dataclass
class _Window:
    """The steps since the last report."""

    clock: StepClock
    losses: list[Tensor] = field(default_factory=list)
    learns: list[Tensor] = field(default_factory=list)
    sizes: list[StepSize] = field(default_factory=list)
    last: StepResult | None = None

    def add(self, result: StepResult, size: StepSize) -> None:
        self.clock.count()
        self.losses.append(result.loss)
        self.learns.append(torch.ones_like(result.loss, dtype=torch.bool) if result.learns is None else result.learns)
        self.sizes.append(size)
        self.last = result

    def take(self) -> tuple[float | None, StepResult, list[StepSize]]:
        """Mean loss of the window, its last step and the sizes of its steps; empties it.

        Steps without a token to learn have no loss; where all are such, neither has the window.
        """
        assert self.last is not None, "a report follows a step"
        losses, sizes = torch.stack(self.losses)[torch.stack(self.learns)], list(self.sizes)
        finite = losses[losses.isfinite()]  # a step that was left out may have had no number
        mean = float((finite if len(finite) else losses).mean()) if len(losses) else None
        self.losses.clear()
        self.learns.clear()
        self.sizes.clear()
        return mean, self.last, sizes


def _report(schedule: TrainSchedule, context: LoopContext, state: RunState, window: _Window) -> None:
    seconds = window.clock.lap()
    loss, last, sizes = window.take()
    if loss is None:
        steps = "1 step" if len(sizes) == 1 else f"{len(sizes)} steps"
        context.reporter.message(
            f"{steps} up to iteration {state.iteration} had no label in the batch, and so no loss: see the labels or "
            "loss masks of the data"
        )
    metrics = step_metrics(
        loss=loss,
        learning_rate=last.learning_rate,
        grad_norm=float(last.grad_norm),
        loss_scale=last.loss_scale,
        more=_reported(last),
        consumed_tokens=state.consumed_tokens,
        seconds=seconds,
        tokens=sum(size.tokens for size in sizes) / len(sizes),
        flops=sum(size.samples * schedule.flops(size.length) for size in sizes) / len(sizes),
        peak_flops=schedule.peak_flops,
        peak_memory_bytes=float(context.peak_memory()),
    )
    context.reporter.train(state.iteration, {**metrics, **context.hooks.metrics()}, total_iterations=schedule.total)


def _reported(step: StepResult) -> dict[str, float]:
    """Returns the further values of a step; without losses of tokens where none had a label."""
    learns = step.learns is None or bool(step.learns)
    return {name: float(value) for name, value in step.more.items() if learns or not name.startswith(FURTHER)}


def _lr_step(schedule: TrainSchedule, state: RunState, size: StepSize) -> int:
    """Step, or number of samples, of the learning-rate schedule for the coming step."""
    return state.consumed_samples + size.samples if schedule.counts_samples else state.updates + 1


def _values_due(schedule: TrainSchedule, context: LoopContext, state: RunState) -> bool:
    """Whether a report, an evaluation, a save or the end of the run needs the values of the last step."""
    return (
        schedule.reports(state.iteration)
        or _evaluation_due(schedule, context, state)
        or (context.save is not None and _save_due(schedule, state))
    )


def _evaluation_due(schedule: TrainSchedule, context: LoopContext, state: RunState) -> bool:
    due = intervals.every(state.iteration, schedule.eval_interval) or state.iteration == schedule.total
    return due and _evaluates(schedule, context)


def _starts_with_evaluation(schedule: TrainSchedule, context: LoopContext, state: RunState) -> bool:
    """Whether an evaluation is to be made up that the run before did not end, or is all that there is to do."""
    if not _evaluates(schedule, context):
        return False
    missing = context.evaluated.start(state.iteration) if context.evaluated is not None else False
    return schedule.total == 0 or (missing and _evaluation_due(schedule, context, state))


def _evaluates(schedule: TrainSchedule, context: LoopContext) -> bool:
    return context.valid is not None and schedule.eval_iters > 0


def _save_due(schedule: TrainSchedule, state: RunState) -> bool:
    return intervals.save_due(
        state.iteration, scale=schedule.save_scale, factor=schedule.save_factor, extra=schedule.save_extra
    )


def _ends_here(schedule: TrainSchedule, state: RunState) -> bool:
    """Whether the configuration ends the run at this iteration."""
    return state.iteration == schedule.total or intervals.every(state.iteration, schedule.exit_interval)


def _reason_to_stop(
    schedule: TrainSchedule, context: LoopContext, state: RunState, stops: Callable[[bool], bool]
) -> str | None:
    """The reason that any rank has; every rank gets an answer at the same iteration. None at the last one.

    Args:
        schedule: numbers of the run.
        context: objects of the run.
        state: progress of the run.
        stops: whether any rank has a reason, now or at the call before; collective.
    """
    if state.iteration >= schedule.total:
        return None
    reason = intervals.exit_due(
        state.iteration,
        interval=schedule.exit_interval,
        elapsed_seconds=state.elapsed(),
        duration_minutes=schedule.exit_minutes,
    )
    if context.stop_requested():
        reason = "a signal asked for it"
    at_interval = intervals.every(state.iteration, schedule.exit_interval)  # alike on all ranks
    return (reason or "another rank asked for it") if at_interval or stops(reason is not None) else None
