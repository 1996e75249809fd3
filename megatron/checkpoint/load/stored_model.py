"""A checkpoint on the disk as a model, whole tensor by whole tensor, without building anything.

Converters, the resharding tool and the inspector read checkpoints through this.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron.checkpoint.format import integrity, layout
from megatron.checkpoint.format.optimizer_shards import MASTER, OptimizerState
from megatron.checkpoint.format.weight_shards import StoredWeights, WeightFiles, key_of
from megatron.checkpoint.load.merge_shards import assemble
from megatron.config import resolve, serialize
from megatron.config.schema.checkpoint import CheckpointSection
from megatron.config.schema.generation import GenerationSection
from megatron.config.schema.mixers import MixersSection
from megatron.config.schema.model import ModelSection
from megatron.config.schema.moe import MoeSection
from megatron.config.schema.mup import MupSection
from megatron.config.schema.task import TaskSection
from megatron.config.schema.tokenizer import TokenizerSection
from megatron.errors import ConfigError, RunError
from megatron.param_table import ModelDims, TensorShape, tensors

_ANY = re.compile(r"global_step\d+|\d+")


class _Described(Protocol):
    """What a configuration says of a model."""

    @property
    def model(self) -> ModelSection: ...

    @property
    def moe(self) -> MoeSection: ...

    @property
    def mixers(self) -> MixersSection: ...

    @property
    def mup(self) -> MupSection: ...

    @property
    def tokenizer(self) -> TokenizerSection: ...

    @property
    def generation(self) -> GenerationSection: ...

    @property
    def task(self) -> TaskSection: ...

    @property
    def checkpoint(self) -> CheckpointSection: ...


@dataclass(frozen=True)
class StoredModel:
    """The weights of a checkpoint and what is known of the model."""

    directory: Path
    """The checkpoint's folder."""
    model: ModelSection
    """Model section of its configuration."""
    moe: MoeSection
    """Mixture-of-experts section."""
    mixers: MixersSection
    """Section of blocks without attention."""
    mup: MupSection
    """Section of muP."""
    tokenizer: TokenizerSection
    """Tokenizer section."""
    generation: GenerationSection
    """Generation section."""
    table: tuple[TensorShape, ...]
    """Its tensors."""
    rows: int
    """Of the embedding, padding included."""
    weights: StoredWeights
    """Its weight files."""
    masters: OptimizerState | None
    """The optimizer's fp32 copies, where kept."""
    labels: tuple[str, ...]
    """Names of a classifier's classes."""
    architecture: str | None
    """Family in transformers that it is of, if that is known."""

    def full_tensor(self, shape: TensorShape, *, precise: bool = False) -> Tensor:
        """The global tensor as stored; precise: the optimizer's fp32 copy of it, if there is one."""
        key = key_of(shape)
        found = self.optimizer_tensor(shape, MASTER) if precise else None
        if found is not None:
            return found
        return assemble(shape, self.weights.shards(key), summed=self.model.gpt_j_residual)

    def optimizer_tensor(self, shape: TensorShape, name: str) -> Tensor | None:
        """The global tensor of the optimizer's values of this name, fp32; None if there are none."""
        key = key_of(shape)
        if self.masters is None or name not in self.masters.names(key):
            return None
        return self.masters.shard(key, name, model_rank=0, model_size=1).view(shape.shape)

    def leftovers(self) -> list[str]:
        """Stored tensors that the model does not have, in order."""
        return sorted(self.weights.keys() - {key_of(shape) for shape in self.table})

    def missing(self) -> list[str]:
        """Tensors of the model that are not stored."""
        return sorted({key_of(shape) for shape in self.table} - self.weights.keys())


def open_model(path: Path, *, iteration: int | None = None, config_files: Sequence[Path] = ()) -> StoredModel:
    """A checkpoint's model. path: a save folder (the latest unless iteration is given), or one checkpoint's own.

    config_files: describe the model where the checkpoint was not written by us. Raises ConfigError where nothing says
    what the model is, RunError where the checkpoint is damaged or holds other tensors than that model.
    """
    directory = choose(path, iteration)
    if integrity.is_ours(directory):
        RunError.raise_any(integrity.damage(directory))
    elif not layout.model_files(directory) and not layout.layer_files(directory):
        others = [each for each in layout.iterations(path) if layout.step_directory(path, each) != directory]
        hint = f"choose one with --iteration: {', '.join(map(str, others))}" if others else "give another checkpoint"
        raise RunError.of("no weight files", location=str(directory), hint=hint)
    config: _Described = describe(directory, config_files)
    model, moe, mixers, tokenizer = config.model, config.moe, config.mixers, config.tokenizer
    weights = WeightFiles.open(directory)
    embedding = weights.shards("0.word_embeddings.weight")
    rows = sum(shard.shape[0] for shard in embedding)
    table = tuple(tensors(ModelDims.of(model, moe, mixers), rows))
    masters = OptimizerState.open(directory, {key_of(shape): shape for shape in table})
    sections = (model, moe, mixers, config.mup, tokenizer, config.generation)
    stored = StoredModel(
        directory,
        *sections,
        table,
        rows,
        weights,
        masters,
        config.task.task_labels or (),
        config.checkpoint.hf_architecture,
    )
    _compare(stored)
    return stored


def choose(path: Path, iteration: int | None) -> Path:
    """The folder of one checkpoint. ConfigError when there is none."""
    found = layout.iterations(path)
    if iteration is not None:
        directory = layout.step_directory(path, iteration)
        if iteration not in found:
            raise ConfigError.of("there is no such checkpoint", key="iteration", value=iteration, location=str(path))
        return directory
    pointer = path / layout.LATEST
    if pointer.is_file():
        directory = path / pointer.read_text(encoding="utf-8").strip()
        if not _ANY.fullmatch(directory.name) or not directory.is_dir():
            raise RunError.of("names a checkpoint that is not there", location=str(pointer), hint="give an iteration")
        return directory
    if found:
        return layout.step_directory(path, found[-1])
    if path.is_dir() and (layout.model_files(path) or layout.layer_files(path)):
        return path
    raise ConfigError.of("there is no checkpoint", location=str(path), hint="give a save folder or one of its steps")


def describe(directory: Path, config_files: Sequence[Path]) -> Any:
    """The configuration of a checkpoint: of the YAML files, else the one that is in it. ConfigError without."""
    resolved = directory / layout.RESOLVED
    if config_files:
        return resolve([str(path) for path in config_files], {"user_script": "generate.py"}).config
    if not resolved.is_file():
        raise ConfigError.of(
            "nothing says what model this is", location=str(directory), hint="give the run's YAML with --config-file"
        )
    return serialize.from_json(resolved.read_text(encoding="utf-8"), str(resolved))


def _compare(stored: StoredModel) -> None:
    """RunError when the stored tensors are not the model's."""
    location = str(stored.directory)
    if stored.leftovers() or stored.missing():
        raise RunError.of(
            f"the model lacks {', '.join(stored.leftovers()[:8]) or 'nothing'} of the checkpoint, "
            f"and the checkpoint lacks {', '.join(stored.missing()[:8]) or 'nothing'} of the model",
            location=location,
            hint="give the configuration of this checkpoint",
        )
    for shape in stored.table:
        held = stored.weights.shards(key_of(shape))
        expected = shape.local_shape(stored.weights.model_size)
        if any(tuple(shard.shape) != expected for shard in held):
            raise RunError.of(
                f"tensor {key_of(shape)} has shape {list(held[0].shape)} on each rank, the model's is {list(expected)}",
                location=location,
            )
