"""A checkpoint in another layout, offline: weights cut anew, everything else taken over."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.atomic import flush_to_disk
from megatron.checkpoint.format import files, layout
from megatron.checkpoint.format.files import Written
from megatron.checkpoint.format.metadata import public_facts
from megatron.checkpoint.load.stored_model import StoredModel, open_model
from megatron.checkpoint.offline.write_resharded import write_weights
from megatron.checkpoint.save.commit import make_room, publish
from megatron.errors import ConfigError, ConfigIssue, RunError
from megatron.param_table import TensorShape


def reshape(
    load: Path,
    save: Path,
    *,
    model_size: int,
    pipe_size: int,
    iteration: int | None = None,
    config_files: Sequence[Path] = (),
) -> Path:
    """Writes <save>/global_step<N> of the same iteration and points `latest` at it; returns its folder.

    Raises ConfigError where the sizes do not fit the model.

    Args:
        load: A save folder or one checkpoint.
        save: The save folder to write.
        model_size: tensor-parallel degree of the weight files.
        pipe_size: Stages, 0 for files that hold all layers.
        iteration: The iteration to read; the newest if None.
        config_files: YAML files that describe the model; the checkpoint's own if empty.
    """
    stored = open_model(load, iteration=iteration, config_files=config_files)
    refuse_uneven(stored.table, model_size)
    number = layout.iteration_of(stored.directory) or 0
    final, partial = layout.step_directory(save, number), layout.partial_directory(save, number)
    if final.exists():
        raise RunError.of("the checkpoint is there already", location=str(final), hint="give another --save-dir")
    make_room(partial)
    try:
        summed = stored.model.gpt_j_residual
        facts = describe_tokenizer(stored, number, model_size)
        sizes = {"model_size": model_size, "pipe_size": pipe_size}
        written = write_weights(partial, stored.table, stored.full_tensor, summed=summed, facts=facts, **sizes)
        written += _taken_over(stored.directory, partial)
        publish(partial, final, written)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def refuse_uneven(table: Sequence[TensorShape], model_size: int) -> None:
    """ConfigError where so many tensor-parallel ranks cannot share the model."""
    ConfigError.raise_any(_uneven(table, model_size))


def _uneven(table: Sequence[TensorShape], size: int) -> Iterator[ConfigIssue]:
    for shape in table:
        try:
            shape.local_shape(size)
        except ValueError as error:
            yield ConfigIssue(f"{shape.layer}.{shape.name}: {error}", key="target_tensor_parallel_size", value=size)
            return


def describe_tokenizer(stored: StoredModel, iteration: int, model_size: int) -> dict[str, object]:
    """What the model files of a rewritten checkpoint say beside the weights."""
    run = stored.directory / layout.RUN
    counters = files.read_json(run)["counters"] if run.is_file() else {}
    return public_facts(
        stored.model,
        iteration=iteration,
        consumed_samples=counters.get("consumed_samples", 0),
        skipped=counters.get("skipped", 0),
        data_size=1,
        model_size=model_size,
        tokenizer_type=stored.tokenizer.tokenizer_type,
        divisible_by=stored.tokenizer.make_vocab_size_divisible_by,
        padded_vocab_size=stored.rows,
    )


def _taken_over(source: Path, target: Path) -> Iterator[Written]:
    """State and configuration, file by file."""
    for folder in (layout.STATE, layout.CONFIGS):
        for path in sorted((source / folder).glob("*")):
            copy = target / folder / path.name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
            with copy.open("rb") as file:
                flush_to_disk(file)
            yield Written(copy, copy.stat().st_size, files.digest(copy))
