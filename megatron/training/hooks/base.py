"""Hooks: objects that observe the training loop at named moments.

A hook is a subclass of `Hook` that overrides the moments it needs, plus one line in `build_hooks` of trainer.py. The
loop calls the hooks in the order of that list. Moments in which ranks communicate must be reached by all ranks alike.

The order of moments in a run:

    on_run_start
    for each step:   before_step, around_step, after_step, outcome, and for a reported step metrics
    for saves:       before_save, around_save, after_save
    for evaluations: before_evaluate, after_evaluate
    on_run_end
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Protocol

from megatron.data.dataset.batch import MicroBatch
from megatron.engine.engine import StepResult
from megatron.training.run_state import RunState
from megatron.training.step_outcomes import StepOutcome
from megatron.training.step_schedule import StepSize


class BatchSource(Protocol):
    """Serves micro batches from any sample on."""

    @property
    def full_pass(self) -> int | None:
        """Micro batches of an evaluation that reads all of it; None for as many as eval_iters asks for."""

    def batches(self, consumed_samples: int = 0) -> Iterator[MicroBatch]: ...


class Hook:
    """Base class of hooks; every moment does nothing."""

    def on_run_start(self, state: RunState) -> None:
        """Called once, before the first step."""

    def before_step(self, iteration: int, size: StepSize) -> None:
        """Called before a training step. iteration: the one that the step makes, counted from 1."""

    def around_step(self, iteration: int, size: StepSize) -> AbstractContextManager[None]:
        """Context of a training step, for hooks that must clean up when the step raises."""
        return nullcontext()

    def after_step(self, state: RunState, size: StepSize, result: StepResult) -> None:
        """Called after a training step was issued, before `state` counts it. Reading a tensor of `result` waits."""

    def outcome(self, outcome: StepOutcome) -> None:
        """Called with the values of each step in order. May raise RunError to end the run.

        On a GPU they come one step later, while the next one runs, but before a report, an evaluation, a save and the
        end of the run.
        """

    def metrics(self) -> Mapping[str, float]:
        """Further metrics of a report, by name. Called on every rank."""
        return {}

    def before_evaluate(self, state: RunState) -> None:
        """Called before an evaluation on the validation split."""

    def after_evaluate(self, state: RunState) -> bool | None:
        """Called after an evaluation that was not interrupted by a stop request.

        Returns False, on all ranks, where a stop request ended what the hook adds to the evaluation: a resume then
        evaluates again.
        """

    def before_save(self, state: RunState) -> None:
        """Called before a checkpoint is saved."""

    def around_save(self, state: RunState) -> AbstractContextManager[None]:
        """Context of a save."""
        return nullcontext()

    def after_save(self, state: RunState) -> None:
        """Called after a checkpoint is saved, or handed to the background writer."""

    def around_data_wait(self, split: str) -> AbstractContextManager[None]:
        """Context of each wait for a micro batch. split: "train", "validation" or "test"."""
        return nullcontext()

    def on_run_end(self, state: RunState) -> None:
        """Called once, after the last step and the last save; not when the run raised."""


class Hooks:
    """Calls a list of hooks in order."""

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        self._hooks = tuple(hooks)

    def on_run_start(self, state: RunState) -> None:
        for hook in self._hooks:
            hook.on_run_start(state)

    @contextmanager
    def step(self, iteration: int, size: StepSize) -> Iterator[None]:
        """Moments before and around the step of this iteration."""
        for hook in self._hooks:
            hook.before_step(iteration, size)
        with self._all(lambda hook: hook.around_step(iteration, size)):
            yield

    def after_step(self, state: RunState, size: StepSize, result: StepResult) -> None:
        for hook in self._hooks:
            hook.after_step(state, size, result)

    def outcome(self, outcome: StepOutcome) -> None:
        for hook in self._hooks:
            hook.outcome(outcome)

    def metrics(self) -> dict[str, float]:
        """Metrics of all hooks; collective."""
        return {name: value for hook in self._hooks for name, value in hook.metrics().items()}

    def before_evaluate(self, state: RunState) -> None:
        for hook in self._hooks:
            hook.before_evaluate(state)

    def after_evaluate(self, state: RunState) -> bool:
        """Returns whether the evaluation is complete."""
        return False not in [hook.after_evaluate(state) for hook in self._hooks]

    @contextmanager
    def save(self, state: RunState) -> Iterator[None]:
        """Moments before, around and after a save."""
        for hook in self._hooks:
            hook.before_save(state)
        with self._all(lambda hook: hook.around_save(state)):
            yield
        for hook in self._hooks:
            hook.after_save(state)

    def batches(self, source: BatchSource, split: str, consumed_samples: int = 0) -> Iterator[MicroBatch]:
        """Yields the source's micro batches; each wait for one is within `around_data_wait`."""
        batches = source.batches(consumed_samples)
        while True:
            with self._all(lambda hook: hook.around_data_wait(split)):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def on_run_end(self, state: RunState) -> None:
        for hook in self._hooks:
            hook.on_run_end(state)

    @contextmanager
    def _all(self, context: Callable[[Hook], AbstractContextManager[None]]) -> Iterator[None]:
        with ExitStack() as stack:
            for hook in self._hooks:
                stack.enter_context(context(hook))
            yield
