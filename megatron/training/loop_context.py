"""The numbers and objects that the training loop works with; trainer.py makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from megatron.data.dataset.batch import MicroBatch
from megatron.engine.engine import TrainingEngine
from megatron.evaluation.char_perplexity import Characters
from megatron.metrics.reporter import Reporter
from megatron.optim.lr_schedule import LRSchedule
from megatron.training import intervals
from megatron.training.evaluation_mark import EvaluationMark
from megatron.training.hooks.base import BatchSource, Hooks
from megatron.training.run_state import RunState
from megatron.training.step_schedule import StepSizes


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
    to_device: Callable[[MicroBatch], MicroBatch] = lambda batch: batch
    """Starts the copy of a micro batch to the device, and returns the copy."""
    outcome_lag: int = 0
    """Newest steps whose values stay on the device, see step_outcomes.py."""
    evaluated: EvaluationMark | None = None
    """The last complete evaluation, for a resume; None when nothing is saved."""
    characters: Characters | None = None
    """Counts the characters of evaluations, for the perplexity a character."""
    saved_weights: Callable[[], AbstractContextManager[None]] = nullcontext
    """Context in which the model has the weights that evaluations and checkpoints take. Collective."""
    average: Callable[[], AbstractContextManager[None]] | None = None
    """Context in which the model has the moving average of its weights; None without one. Collective."""
    valid_sets: Mapping[str, BatchSource] = field(default_factory=dict)
    """Validation data sets that have a loss of their own, by name."""
