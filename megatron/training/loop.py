"""The training loop: step, count, report, evaluate?, save?, stop?

Everything it uses is handed to it (see trainer.py, which wires it), so this page is the order of events and nothing
else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron.data.dataset.batch import MicroBatch
from megatron.distributed.process_group import any_rank
from megatron.engine.engine import StepResult, TrainingEngine
from megatron.errors import RunError
from megatron.evaluation.char_perplexity import Characters
from megatron.metrics.reporter import Reporter
from megatron.metrics.timers import StepClock
from megatron.optim.lr_schedule import Schedule
from megatron.training import intervals
from megatron.training.run_state import RunState
from megatron.training.step_schedule import StepSize, StepSizes


@dataclass(frozen=True)
class Plan:
    """The numbers of a run, all derived before it starts.

    total, log_interval, eval_interval, eval_iters, exit_interval [steps]; exit_minutes [minutes]; samples a step, and
    micro_batches a step and data-parallel rank, of a whole batch; sizes: of each step; flops: of a sequence of some
    length on one GPU; peak_flops: [FLOP/s], 0 if unknown; counts_samples: the schedule counts samples and no steps;
    overflow_limit [steps].
    """

    total: int
    log_interval: int
    eval_interval: int
    eval_iters: int
    exit_interval: int | None
    exit_minutes: float | None
    save_scale: str
    save_factor: float | None
    save_extra: tuple[int, ...]
    samples: int
    micro_batches: int
    sizes: StepSizes
    flops: Callable[[int], float]
    peak_flops: float
    overflow_limit: int = 50
    counts_samples: bool = False

    def reports(self, iteration: int) -> bool:
        """Whether the iteration is reported."""
        return intervals.every(iteration, self.log_interval) or iteration in (1, self.total)


class BatchSource(Protocol):
    """Serves micro-batches from any sample on."""

    def batches(self, consumed_samples: int = 0) -> Iterator[MicroBatch]: ...


@dataclass(frozen=True)
class Parts:
    """What the loop works with.

    train: None where there is no step to make. save: writes a checkpoint of the state, None when nothing is saved.
    check_saves: raises if one that is still being written has failed. judge: looks at each step before it counts.
    recording: around each step. measure: further metrics of a report. characters: counts them in evaluations.
    evaluate_tasks: scores the model on tasks, where there are any; None when a stop was asked for meanwhile.
    """

    engine: TrainingEngine
    schedule: Schedule
    train: BatchSource | None
    valid: BatchSource | None
    reporter: Reporter
    stop_requested: Callable[[], bool]
    save: Callable[[RunState], None] | None
    check_saves: Callable[[], None]
    synchronize: Callable[[], None]
    peak_memory: Callable[[], int]
    judge: Callable[[RunState, StepSize, StepResult], None] = lambda state, size, result: None
    recording: Callable[[int, StepSize], AbstractContextManager[None]] = lambda iteration, size: nullcontext()
    measure: Callable[[], Mapping[str, float]] = dict
    characters: Characters | None = None
    valid_sets: Mapping[str, BatchSource] = field(default_factory=dict)  # by name, where each has a loss of its own
    evaluate_tasks: Callable[[], dict[str, float] | None] | None = None


def run_loop(plan: Plan, parts: Parts, state: RunState) -> str | None:
    """Trains up to the last iteration, or until asked to stop; returns why it stopped early.

    The last state is saved in either case. Raises RunError where `judge` does.
    """
    batches = parts.train.batches(state.consumed_samples) if parts.train is not None else iter(())
    window = _Window(StepClock(parts.synchronize))
    overflows = _Overflows(plan.overflow_limit)
    saved_at = state.iteration
    reason = None
    if parts.save is not None and state.iteration == 0 and _save_due(plan, state):
        parts.save(state)
    while state.iteration < plan.total and reason is None:
        size = plan.sizes.of(state.iteration, state.consumed_samples)
        parts.engine.prepare(size.micro_batches, size.length)
        with parts.recording(state.iteration + 1, size):
            result = parts.engine.train_step(size.of(batches), parts.schedule.rate(_place(plan, state, size)))
        parts.judge(state, size, result)
        state.advance(samples=size.samples, tokens=size.tokens, skipped=result.skipped)
        window.add(result, size)
        overflows.add(result, state.iteration)
        if plan.reports(state.iteration):
            _report(plan, parts, state, window)
        else:
            parts.reporter.progress(state.iteration)
        if _evaluation_due(plan, parts, state):
            with window.clock.excluded():
                evaluate(plan, parts, state)
        parts.check_saves()
        reason = _reason_to_stop(plan, parts, state)
        last = reason is not None or state.iteration == plan.total
        if parts.save is not None and (last or _save_due(plan, state)):
            with window.clock.excluded():
                parts.save(state)
            saved_at = state.iteration
            reason = reason or _reason_to_stop(plan, parts, state)  # a save takes long enough for a signal to come
    if parts.save is not None and saved_at != state.iteration:
        parts.save(state)
    return reason


def evaluate(plan: Plan, parts: Parts, state: RunState, *, split: str = "validation") -> None:
    """Reports the mean loss of `eval_iters` global batches, which follow those of the evaluation before.

    Each data set that has a loss of its own follows. A stop signal is looked for between batches; it gives the
    evaluation up.
    """
    assert parts.valid is not None, "there is validation data wherever an evaluation is due"
    number = (state.iteration - 1) // plan.eval_interval if plan.eval_interval else 0
    own = [(f"{split}/{name}", source) for name, source in parts.valid_sets.items()]
    for name, source in [(split, parts.valid), *own]:
        losses = evaluation_metrics(plan, parts, source.batches(number * plan.eval_iters * plan.samples))
        if losses is None:
            return
        parts.reporter.evaluation(state.iteration, name, losses)
    scores = parts.evaluate_tasks() if parts.evaluate_tasks is not None else None
    if scores is not None:
        parts.reporter.evaluation(state.iteration, "eval", scores)


def evaluation_metrics(plan: Plan, parts: Parts, batches: Iterator[MicroBatch]) -> dict[str, float] | None:
    """The loss of one evaluation over these batches, and what follows from it; None when a stop was asked for."""
    counted = batches if parts.characters is None else parts.characters.counted(batches)
    loss = _evaluated(plan, parts, counted)
    if loss is None:
        parts.reporter.message("the evaluation is given up: a stop was asked for")
        return None
    if parts.characters is None:
        return {"lm_loss": loss}
    return {"lm_loss": loss, "lm_loss_char_lvl_ppl": parts.characters.perplexity(loss)}


def _evaluated(plan: Plan, parts: Parts, batches: Iterator[MicroBatch]) -> float | None:
    """The mean loss [nats a token]; None as soon as a stop is asked for on any rank, which is looked for every few
    micro batches.
    """
    left = plan.eval_iters * plan.micro_batches
    share = plan.micro_batches * -(-parts.engine.least_evaluated // plan.micro_batches)
    loss = tokens = 0.0
    while left > 0:
        if any_rank(parts.stop_requested()):
            return None
        count = min(share, left)
        losses_of, tokens_of = parts.engine.eval_sums(batches, count)
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


def _report(plan: Plan, parts: Parts, state: RunState, window: _Window) -> None:
    seconds = window.clock.lap()
    loss, last, sizes = window.take()
    flops_per_second = sum(size.samples * plan.flops(size.length) for size in sizes) / len(sizes) / seconds
    metrics = {
        "train/lm_loss": loss,
        "train/learning_rate": last.learning_rate,
        "train/grad_norm": float(last.grad_norm),
        "train/loss_scale": last.loss_scale,
        "consumed_tokens": float(state.consumed_tokens),
        "runtime/iteration_time": seconds,
        "runtime/tokens_per_sec": sum(size.tokens for size in sizes) / len(sizes) / seconds,
        "runtime/flops_per_sec_per_gpu": flops_per_second,
        "runtime/peak_memory_bytes": float(parts.peak_memory()),
    }
    metrics |= {f"train/{name}": float(value) for name, value in last.more.items()}
    if plan.peak_flops > 0:
        metrics["runtime/model_flops_utilization"] = flops_per_second / plan.peak_flops
    parts.reporter.train(state.iteration, {**metrics, **parts.measure()}, total_iterations=plan.total)


def _place(plan: Plan, state: RunState, size: StepSize) -> int:
    """Where the learning-rate schedule is asked for the coming step."""
    return state.consumed_samples + size.samples if plan.counts_samples else state.updates + 1


def _evaluation_due(plan: Plan, parts: Parts, state: RunState) -> bool:
    due = intervals.every(state.iteration, plan.eval_interval) or state.iteration == plan.total
    return due and parts.valid is not None and plan.eval_iters > 0


def _save_due(plan: Plan, state: RunState) -> bool:
    return intervals.save_due(state.iteration, scale=plan.save_scale, factor=plan.save_factor, extra=plan.save_extra)


def _reason_to_stop(plan: Plan, parts: Parts, state: RunState) -> str | None:
    """The reason that any rank has; every rank gets an answer at the same iteration. None at the last one."""
    if state.iteration >= plan.total:
        return None
    reason = intervals.exit_due(
        state.iteration,
        interval=plan.exit_interval,
        elapsed_seconds=state.elapsed(),
        duration_minutes=plan.exit_minutes,
    )
    if parts.stop_requested():
        reason = "a signal asked for it"
    return (reason or "another rank asked for it") if any_rank(reason is not None) else None
