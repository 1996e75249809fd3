"""The mean of the last checkpoints of a run (latest weight averaging: arXiv:2209.14981), or one's moving average.

Between the learning rate's maximum and its decay such a mean is about as good as a model whose rate has decayed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron.checkpoint.format import files, layout
from megatron.checkpoint.format.history import ancestors
from megatron.checkpoint.format.optimizer_shards import EMA
from megatron.checkpoint.load.stored_model import StoredModel, choose, describe, open_model
from megatron.checkpoint.offline.reshard import describe_tokenizer, refuse_uneven
from megatron.checkpoint.offline.write_resharded import write_weights
from megatron.checkpoint.save.commit import make_room, publish
from megatron.config import serialize
from megatron.errors import ConfigError, RunError
from megatron.param_table import TensorShape


@dataclass(frozen=True)
class MeanModel:
    """Several models of one shape, each with the same share."""

    models: tuple[StoredModel, ...]
    """The models, oldest first."""

    def full_tensor(self, shape: TensorShape) -> Tensor:
        """The mean of a global tensor, summed in fp32, of fp32 copies where there are any; in the newest one's type."""
        newest = self.models[-1].full_tensor(shape)
        total = self.models[0].full_tensor(shape, precise=True).float()
        for model in self.models[1:]:
            total = total + model.full_tensor(shape, precise=True).float()
        return (total / len(self.models)).to(newest.dtype)


@dataclass(frozen=True)
class MovingAverageModel:
    """The exponential moving average that a checkpoint has beside its weights."""

    model: StoredModel
    """The checkpoint."""

    def full_tensor(self, shape: TensorShape) -> Tensor:
        """The average of a global tensor, in the type of the weights; the weights of one that is not trained."""
        stored = self.model.full_tensor(shape)
        found = self.model.optimizer_tensor(shape, EMA)
        return stored if found is None else found.to(stored.dtype)


@dataclass(frozen=True)
class Chosen:
    """Checkpoints of one run."""

    iterations: list[int]
    """Those to average, oldest first."""
    others: list[int]
    """Those that are as new as the oldest of them, and of another history than the newest."""


def chosen_iterations(load: Path, last: int, until: int | None) -> Chosen:
    """Returns the last checkpoints of a save folder's run. ConfigError for too few.

    They are the newest, which `latest` names, and those that it was trained from: a run that went on from an earlier
    iteration leaves later checkpoints of the first one behind.

    Args:
        load: Save folder.
        last: Number of checkpoints.
        until: Newest iteration to take; None for the one that `latest` names.
    """
    if last < 2:
        raise ConfigError.of("a mean needs two checkpoints at least", key="last", value=last, hint="write 2 or more")
    there = layout.iterations(load)
    known = [one for one in there if until is None or one <= until]
    newest = known[-1] if known else None
    if known and until is None and (load / layout.LATEST).is_file():
        newest = layout.iteration_of(choose(load, None)) or newest
    found = [] if newest is None else [*ancestors(load, newest), newest]
    others = [one for one in known if one not in found]
    if len(found) < last:
        further = f", and {', '.join(map(str, others))} of another history" if others else ""
        raise ConfigError.of(
            f"{len(found)} checkpoints are there: {', '.join(map(str, found)) or 'none'}{further}",
            key="last",
            value=last,
            location=str(load),
            hint="give a smaller number, or keep more with keep_last_n_checkpoints",
        )
    return Chosen(found[-last:], [one for one in others if one > found[-last]])


def average(
    load: Path, save: Path, *, last: int, iteration: int | None = None, config_files: Sequence[Path] = (), **sizes: int
) -> tuple[Path, Chosen]:
    """Writes <save>/global_step<N> of the newest iteration and points `latest` at it; returns it and the iterations.

    It holds weights and their configuration, and no optimizer state. Raises ConfigError for too few checkpoints or
    sizes that do not fit the model, RunError where the models differ.

    Args:
        load: Save folder of the run.
        save: Folder to write to.
        last: Number of checkpoints.
        iteration: Newest iteration to take; the one that `latest` names unless given.
        config_files: Configuration files, for checkpoints without their own.
        sizes: `model_size`, `pipe_size`: tensor- and pipeline-parallel degree of the result.
    """
    chosen = chosen_iterations(load, last, iteration)
    numbers = chosen.iterations
    models = tuple(open_model(load, iteration=number, config_files=config_files) for number in numbers)
    newest = models[-1]
    for model in models:
        if model.table != newest.table:
            raise RunError.of(
                f"its tensors are not those of {newest.directory.name}",
                location=str(model.directory),
                hint="give an --iteration and a --last of one model",
            )
    return _write(newest, save, MeanModel(models), numbers[-1], config_files, **sizes), chosen


def moving_average(
    load: Path, save: Path, *, iteration: int | None = None, config_files: Sequence[Path] = (), **sizes: int
) -> tuple[Path, int]:
    """Writes the moving average of one checkpoint as `average` writes a mean; returns its folder and the iteration.

    Raises RunError for a checkpoint without one, and what `average` raises.

    Args:
        load: Save folder of the run, or one checkpoint.
        save: Folder to write to.
        iteration: Checkpoint to take; the newest unless given.
        config_files: Configuration files, for checkpoints without their own.
        sizes: `model_size`, `pipe_size`: tensor- and pipeline-parallel degree of the result.
    """
    model = open_model(load, iteration=iteration, config_files=config_files)
    if all(model.optimizer_tensor(shape, EMA) is None for shape in model.table):
        raise RunError.of(
            "the checkpoint has no moving average of its weights",
            location=str(model.directory),
            hint="train with ema_decay, or give --last N for the mean of checkpoints",
        )
    number = layout.iteration_of(model.directory)
    assert number is not None, "a checkpoint's folder is named after its iteration"
    return _write(model, save, MovingAverageModel(model), number, config_files, **sizes), number


def _write(
    newest: StoredModel,
    save: Path,
    averaged: MeanModel | MovingAverageModel,
    number: int,
    config_files: Sequence[Path],
    *,
    model_size: int,
    pipe_size: int,
) -> Path:
    refuse_uneven(newest.table, model_size)
    final, partial = layout.step_directory(save, number), layout.partial_directory(save, number)
    if final.exists():
        raise RunError.of("the checkpoint is there already", location=str(final), hint="give another --save-dir")
    make_room(partial)
    try:
        facts = describe_tokenizer(newest, number, model_size)
        sizes = {"model_size": model_size, "pipe_size": pipe_size}
        summed = newest.model.gpt_j_residual
        written = write_weights(partial, newest.table, averaged.full_tensor, summed=summed, facts=facts, **sizes)
        config = describe(newest.directory, config_files).replace(config_files=None)
        written.append(files.write_text(partial / layout.RESOLVED, serialize.to_json(config.without_secrets())))
        publish(partial, final, written)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final
