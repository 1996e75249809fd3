"""The training loop: step, count, report, evaluate, save, stop.

The loop gets every object from trainer.py. One step runs through five files: this one, `engine/base.py` (the step),
`engine/loss_normalization.py` (the divisor of the loss), `optim/grad_clip.py` (norm and clipping at ZeRO 0) and
`nan_guard.py` (non-finite steps and loss spikes). Everything that observes the loop is a hook (`hooks/base.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.process_group import any_rank
from megatron.engine.engine import StepResult, TrainingEngine
from megatron.errors import RunError
from megatron.evaluation.char_perplexity import Characters
from megatron.metrics.reporter import Reporter
from megatron.metrics.step_metrics import step_metrics
from megatron.metrics.timers import StepClock
from megatron.optim.lr_schedule import LRSchedule
from megatron.training import intervals
from megatron.training.hooks.base import BatchSource, Hooks
from megatron.training.run_state import RunState
from megatron.training.step_schedule import StepSize, StepSizes


@dataclass(frozen=True)
class TrainSchedule:
    """The numbers of a run, all derived before it starts."""

    total: int
    """Last iteration [steps]."""
    log_interval: int
    """[steps]."""
    eval_interval: int
    """[steps]."""
    eval_iters: int
    """Global batches of one evaluation."""
    exit_interval: int | None
    """[steps]."""
    exit_minutes: float | None
    """Wall time after which the run saves and exits [min]."""
    save_scale: str
    """`linear` or `log`, see intervals.py."""
    save_factor: float | None
    """See intervals.py."""
    save_extra: tuple[int, ...]
    """Further iterations after which a checkpoint is saved."""
    samples: int
    """Global batch of an evaluation, and of a step unless the batch size ramps up."""
    micro_batches: int
    """Micro batches of such a batch on one data-parallel rank."""
    sizes: StepSizes
    """Size of each step."""
    flops: Callable[[int], float]
    """Sequence length -> FLOPs of one sequence on one GPU."""
    peak_flops: float
    """[FLOP/s], 0 if unknown."""
    overflow_limit: int = 50
    """Steps in a row that may overflow at the smallest loss scale."""
    counts_samples: bool = False
    """True if the learning-rate schedule counts samples instead of steps."""

    def reports(self, iteration: int) -> bool:
        """Whether the iteration is reported."""
        return intervals.every(iteration, self.log_interval) or iteration in (1, self.total)


@dataclass(frozen=True)
class LoopContext:
    """The objects that the loop works with."""

    engine: TrainingEngine
    """Runs the steps."""
    lr_schedule: LRSchedule
    """Learning rate of each step."""
    train: BatchSource | None
    """None where there is no step to make."""
    valid: BatchSource | None
    """Validation batches; None if there are none."""
    reporter: Reporter
    """Writes metrics."""
    stop_requested: Callable[[], bool]
    """True once the run should save and exit."""
    save: Callable[[RunState], None] | None
    """Saves a checkpoint of the state; None when nothing is saved."""
    check_saves: Callable[[], None]
    """Raises if a save in the background has failed."""
    synchronize: Callable[[], None]
    """Waits for the device."""
    peak_memory: Callable[[], int]
    """Largest memory use since the last report [bytes]."""
    hooks: Hooks = field(default_factory=Hooks)
    """Hooks of the run."""
    characters: Characters | None = None
    """Counts the characters of evaluations, for the perplexity a character."""
    valid_sets: Mapping[str, BatchSource] = field(default_factory=dict)
    """Validation data sets that have a loss of their own, by name."""


def run_loop(schedule: TrainSchedule, context: LoopContext, state: RunState) -> str | None:
    """Trains up to the last iteration, or until asked to stop; returns why it stopped early.

    The last state is saved in either case. Raises RunError where a hook does.
    """
    hooks = context.hooks
    batches = hooks.batches(context.train, "train", state.consumed_samples) if context.train is not None else iter(())
    window = _Window(StepClock(context.synchronize))
    overflows = _Overflows(schedule.overflow_limit)
    saved_at = state.iteration
    reason = None
    hooks.on_run_start(state)
    if context.save is not None and state.iteration == 0 and _save_due(schedule, state):
        _save(context, state)
    while state.iteration < schedule.total and reason is None:
        size = schedule.sizes.at(state.iteration, state.consumed_samples)
        context.engine.prepare(size.micro_batches, size.length)
        with hooks.step(state.iteration + 1, size):
            lr = context.lr_schedule.lr(_lr_step(schedule, state, size))
            result = context.engine.train_step(size.truncate(batches), lr)
        hooks.after_step(state, size, result)
        state.advance(samples=size.samples, tokens=size.tokens, skipped=result.skipped)
        window.add(result, size)
        overflows.add(result, state.iteration)
        if schedule.reports(state.iteration):
            _report(schedule, context, state, window)
        else:
            context.reporter.progress(state.iteration)
        if _evaluation_due(schedule, context, state):
            with window.clock.excluded():
                evaluate(schedule, context, state)
        context.check_saves()
        reason = _reason_to_stop(schedule, context, state)
        last = reason is not None or state.iteration == schedule.total
        if context.save is not None and (last or _save_due(schedule, state)):
            with window.clock.excluded():
                _save(context, state)
            saved_at = state.iteration
            reason = reason or _reason_to_stop(schedule, context, state)  # a signal may come during a save
    if context.save is not None and saved_at != state.iteration:
        _save(context, state)
    hooks.on_run_end(state)
    return reason


def _save(context: LoopContext, state: RunState) -> None:
    assert context.save is not None
    with context.hooks.save(state):
        context.save(state)


def evaluate(schedule: TrainSchedule, context: LoopContext, state: RunState) -> None:
    """Reports the mean loss of `eval_iters` global batches, which follow those of the evaluation before.

    Each data set that has a loss of its own follows. A stop request is checked between batches and ends the evaluation.
    """
    assert context.valid is not None, "there is validation data wherever an evaluation is due"
    context.hooks.before_evaluate(state)
    number = (state.iteration - 1) // schedule.eval_interval if schedule.eval_interval else 0
    first_sample = number * schedule.eval_iters * schedule.samples
    own = [(f"validation/{name}", source) for name, source in context.valid_sets.items()]
    for name, source in [("validation", context.valid), *own]:
        losses = evaluation_metrics(schedule, context, context.hooks.batches(source, "validation", first_sample))
        if losses is None:
            return
        context.reporter.evaluation(state.iteration, name, losses)
    context.hooks.after_evaluate(state)


def evaluation_metrics(
    schedule: TrainSchedule, context: LoopContext, batches: Iterator[MicroBatch]
) -> dict[str, float] | None:
    """Returns the loss of one evaluation over these batches and metrics derived from it; None after a stop request."""
    counted = batches if context.characters is None else context.characters.counted(batches)
    loss = _mean_loss(schedule, context, counted)
    if loss is None:
        context.reporter.message("the evaluation is given up: a stop was asked for")
        return None
    if context.characters is None:
        return {"lm_loss": loss}
    return {"lm_loss": loss, "lm_loss_char_lvl_ppl": context.characters.perplexity(loss)}


def _mean_loss(schedule: TrainSchedule, context: LoopContext, batches: Iterator[MicroBatch]) -> float | None:
    """Mean loss [nats a token]; None after a stop request on any rank, which is checked every few micro batches."""
    left = schedule.eval_iters * schedule.micro_batches
    share = schedule.micro_batches * -(-context.engine.min_eval_batches // schedule.micro_batches)
    loss = tokens = 0.0
    while left > 0:
        if any_rank(context.stop_requested()):
            return None
        count = min(share, left)
        losses_of, tokens_of = context.engine.eval_sums(batches, count)
        loss, tokens, left = loss + losses_of, tokens + tokens_of, left - count
    return loss / max(1.0, tokens)


@dataclass
class _Overflows:
    """Steps in a row that were skipped although the loss scale fell no further."""

    limit: int
    count: int = 0
    scale: float = float("inf")

    def add(self, result: StepResult, iteration: int) -> None:
        """Counts a step. RunError at the limit."""
        stuck = result.skipped and result.loss_scale >= self.scale
        self.count = self.count + 1 if stuck else 0
        self.scale = result.loss_scale
        if self.count >= self.limit:
            raise RunError.of(
                f"gradients overflowed {self.count} times in a row at the least loss scale, {self.scale:g}, up to "
                f"iteration {iteration}",
                location="training",
                hint="go on from an earlier checkpoint with a lower learning rate, or in bfloat16",
            )


@dataclass
class _Window:
    """The steps since the last report."""

    clock: StepClock
    losses: list[Tensor] = field(default_factory=list)
    sizes: list[StepSize] = field(default_factory=list)
    last: StepResult | None = None

    def add(self, result: StepResult, size: StepSize) -> None:
        self.clock.count()
        self.losses.append(result.loss)
        self.sizes.append(size)
        self.last = result

    def take(self) -> tuple[float, StepResult, list[StepSize]]:
        """Mean loss of the window, its last step and the sizes of its steps; empties it."""
        assert self.last is not None, "a report follows a step"
        losses = torch.stack(self.losses)
        finite = losses[losses.isfinite()]  # a step that was left out may have had no number
        mean, sizes = float((finite if len(finite) else losses).mean()), list(self.sizes)
        self.losses.clear()
        self.sizes.clear()
        return mean, self.last, sizes


def _report(schedule: TrainSchedule, context: LoopContext, state: RunState, window: _Window) -> None:
    seconds = window.clock.lap()
    loss, last, sizes = window.take()
    metrics = step_metrics(
        loss=loss,
        learning_rate=last.learning_rate,
        grad_norm=float(last.grad_norm),
        loss_scale=last.loss_scale,
        more={name: float(value) for name, value in last.more.items()},
        consumed_tokens=state.consumed_tokens,
        seconds=seconds,
        tokens=sum(size.tokens for size in sizes) / len(sizes),
        flops=sum(size.samples * schedule.flops(size.length) for size in sizes) / len(sizes),
        peak_flops=schedule.peak_flops,
        peak_memory_bytes=float(context.peak_memory()),
    )
    context.reporter.train(state.iteration, {**metrics, **context.hooks.metrics()}, total_iterations=schedule.total)


def _lr_step(schedule: TrainSchedule, state: RunState, size: StepSize) -> int:
    """Step, or number of samples, of the learning-rate schedule for the coming step."""
    return state.consumed_samples + size.samples if schedule.counts_samples else state.updates + 1


def _evaluation_due(schedule: TrainSchedule, context: LoopContext, state: RunState) -> bool:
    due = intervals.every(state.iteration, schedule.eval_interval) or state.iteration == schedule.total
    return due and context.valid is not None and schedule.eval_iters > 0


def _save_due(schedule: TrainSchedule, state: RunState) -> bool:
    return intervals.save_due(
        state.iteration, scale=schedule.save_scale, factor=schedule.save_factor, extra=schedule.save_extra
    )


def _reason_to_stop(schedule: TrainSchedule, context: LoopContext, state: RunState) -> str | None:
    """The reason that any rank has; every rank gets an answer at the same iteration. None at the last one."""
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
    return (reason or "another rank asked for it") if any_rank(reason is not None) else None
