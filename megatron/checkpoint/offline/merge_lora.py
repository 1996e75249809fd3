"""Low-rank updates put into the matrices that they change: W + (alpha / rank) B A in place of W, with DoRA's norms.

What comes out is a model like any other, which runs at the speed of the one that it began as.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.adapter_config import LowRank, low_rank, prompt_length
from megatron.checkpoint.format import files, layout
from megatron.checkpoint.load.stored_model import StoredModel, choose, describe, open_model
from megatron.checkpoint.offline.reshard import describe_tokenizer, refuse_uneven
from megatron.checkpoint.offline.write_resharded import write_weights
from megatron.checkpoint.save.commit import make_room, publish
from megatron.config import serialize
from megatron.errors import ConfigError, RunError
from megatron.param_table import DOWN, EXPERT_FACTORS, MAGNITUDE, UP, ModelDims, TensorShape, tensors


@dataclass(frozen=True)
class MergedModel(StoredModel):
    """The plain model."""

    source: StoredModel
    """The one with updates."""
    asked: LowRank
    """Which they are."""

    def full_tensor(self, shape: TensorShape, *, precise: bool = False) -> Tensor:
        """The global tensor with its update, in the type of the stored one; precise: in fp32, from fp32 copies."""
        tensor = self.source.full_tensor(shape, precise=precise)
        if shape.name in EXPERT_FACTORS and shape.name in self.asked.modules():
            return self._merged_experts(shape, tensor, precise)
        module, _, kind = shape.name.rpartition(".")
        if kind != "weight" or module not in self.asked.modules():
            return tensor
        down, up = (self._factor(shape, f"{module}.{name}.weight", precise) for name in (DOWN, UP))
        changed = tensor.float() + self.asked.scale * (up.float() @ down.float())  # [out, in]
        if self.asked.magnitudes:
            norms = torch.linalg.vector_norm(changed, dim=1).to(self.source.full_tensor(shape).dtype)  # as in training
            magnitudes = self._factor(shape, f"{module}.{MAGNITUDE}.weight", precise).float()
            changed *= (magnitudes / norms.float().clamp_min(torch.finfo(norms.dtype).tiny)).unsqueeze(1)
        return changed if precise else changed.to(tensor.dtype)

    def _merged_experts(self, shape: TensorShape, tensor: Tensor, precise: bool) -> Tensor:
        parts = (self._factor(shape, name, precise).float() for name in EXPERT_FACTORS[shape.name])
        left, right = (part.unflatten(0, (len(shape.sections), -1)) for part in parts)  # [e, w, r], [e, r, h]
        changed = tensor.float() + self.asked.scale * (left @ right).flatten(0, 1)
        return changed if precise else changed.to(tensor.dtype)

    def _factor(self, shape: TensorShape, name: str, precise: bool) -> Tensor:
        factor = next(one for one in self.source.table if (one.layer, one.name) == (shape.layer, name))
        return self.source.full_tensor(factor, precise=precise)


def merged(stored: StoredModel) -> StoredModel:
    """The model with its updates merged; itself where it has none. ConfigError for one with a learned prompt."""
    model = stored.model
    if prompt_length(model.soft_prompt_tuning):
        raise ConfigError.of(
            "a soft prompt is no part of any matrix, so it cannot be merged into the model",
            key="soft_prompt_tuning",
            value=model.soft_prompt_tuning,
            location=str(stored.directory),
            hint="export it as a folder of peft: tools/convert_to_hf.py --adapter-only",
        )
    asked = low_rank(model.lora)
    if asked is None:
        return stored
    plain = model.model_copy(update={"lora": None})
    table = tuple(tensors(ModelDims.of(plain, stored.moe, stored.mixers), stored.rows))
    facts = {**vars(stored), "model": plain, "table": table}
    return MergedModel(**facts, source=stored, asked=asked)


def merge(
    load: Path,
    save: Path,
    *,
    model_size: int,
    pipe_size: int,
    iteration: int | None = None,
    config_files: Sequence[Path] = (),
) -> Path:
    """Writes <save>/global_step<N> of the same iteration without updates and points `latest` at it; returns its folder.

    It holds weights and their configuration, and no optimizer state, which belongs to the updates only. Raises
    ConfigError where there is nothing to merge, or the sizes do not fit the model.

    Args:
        load: Folder with the checkpoints of the run that trained the updates.
        save: Folder to write to.
        model_size: Tensor-parallel degree of the result.
        pipe_size: Pipeline-parallel degree of the result.
        iteration: Checkpoint to read; the latest unless given.
        config_files: Configuration files, for a checkpoint without its own.
    """
    directory = choose(load, iteration)
    stored = open_model(directory, config_files=config_files)
    plain = merged(stored)
    if plain is stored:
        raise ConfigError.of("this checkpoint has no low-rank updates", key="lora", location=str(directory))
    refuse_uneven(plain.table, model_size)
    number = layout.iteration_of(directory) or 0
    final, partial = layout.step_directory(save, number), layout.partial_directory(save, number)
    if final.exists():
        raise RunError.of("the checkpoint is there already", location=str(final), hint="give another --save-dir")
    make_room(partial)
    try:
        facts = describe_tokenizer(plain, number, model_size)
        sizes = {"model_size": model_size, "pipe_size": pipe_size}
        written = write_weights(
            partial, plain.table, plain.full_tensor, summed=plain.model.gpt_j_residual, facts=facts, **sizes
        )
        config = describe(directory, config_files).replace(lora=None, config_files=None)
        written.append(files.write_text(partial / layout.RESOLVED, serialize.to_json(config.without_secrets())))
        publish(partial, final, written)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final
