"""A folder of `transformers` becomes a checkpoint of ours, at any degree of parallelism, a layer at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.format import files, layout
from megatron.checkpoint.format.metadata import public_facts
from megatron.checkpoint.format.optimizer_shards import VOCABULARY, pad_rows
from megatron.checkpoint.format.weight_shards import key_of
from megatron.checkpoint.huggingface import safetensors_format
from megatron.checkpoint.huggingface.model_folder import Folder
from megatron.checkpoint.huggingface.read_adapter import read_adapter
from megatron.checkpoint.load.merge_shards import as_stored, assemble
from megatron.checkpoint.offline.write_resharded import write_weights
from megatron.checkpoint.save.commit import make_room, publish
from megatron.config import Resources, resolve, serialize
from megatron.config.derived.encoder import CONVERSION
from megatron.config.derived.vocabulary import padded_vocab_size
from megatron.errors import RunError
from megatron.param_table import ModelDims, TensorShape, tensors

TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Adopted:
    """What was written."""

    directory: Path
    """The checkpoint's folder."""
    settings: dict[str, Any]
    """The model as keys of a configuration."""
    tensors: int
    """Number of tensors."""
    rows: int
    """Of the embedding, padding included."""


def adopt(
    folder: Folder,
    save: Path,
    *,
    model_size: int = 1,
    pipe_size: int = 0,
    dtype: torch.dtype | None = None,
    given: Mapping[str, Any] | None = None,
    further: Mapping[str, Any] | None = None,
    adapter: Path | None = None,
) -> Adopted:
    """Writes <save>/global_step0 and points `latest` at it.

    Raises ConfigError or RunError for what cannot be taken over: a setting, a tensor that is missing or left over, a
    shape.

    Args:
        folder: The folder that transformers wrote.
        save: The save folder to write.
        model_size: The layout of the weight files, which any run reads.
        pipe_size: The layout of the weight files, which any run reads.
        dtype: None keeps the stored one.
        given: Keys of the model that config.json leaves open.
        further: Keys for the configuration that is kept with the checkpoint.
        adapter: A folder of peft with low-rank updates of this model, which become `lora`.
    """
    settings = folder.settings() | dict(given or {}) | {"vocab_size": folder.rows, "make_vocab_size_divisible_by": 1}
    settings["hf_architecture"] = folder.family.name
    script = CONVERSION if folder.family.encoder else "generate.py"
    flags = {**settings, "user_script": script}
    if not folder.family.encoder_decoder:
        flags["seq_length"] = settings["max_position_embeddings"]
    flags |= {**(further or {}), "model_parallel_size": model_size}
    config = resolve([], flags, Resources(model_size)).config
    dims = plain = ModelDims.of(config.model, config.moe, config.mixers)
    beside = None if adapter is None else read_adapter(adapter, folder, dims)
    if beside is not None:
        settings |= beside.settings
        config = resolve([], {**flags, **beside.settings}, Resources(model_size)).config
        dims = ModelDims.of(config.model, config.moe, config.mixers)
    own = {} if beside is None else beside.tensors
    rows = padded_vocab_size(settings["vocab_size"], 1, model_size)
    table = tensors(dims, rows)
    weights = folder.weights(plain)

    def full_tensor(shape: TensorShape) -> Tensor:
        shards = [own[key_of(shape)]] if key_of(shape) in own else weights.shards(key_of(shape))
        tensor = assemble(as_stored(shape, shards, 1), shards, summed=False)
        if shape.kind in VOCABULARY and tensor.dim() > 0:
            tensor = pad_rows(shape, tensor)
        if tuple(tensor.shape) != shape.shape:
            raise RunError.of(
                f"tensor {key_of(shape)} has shape {list(tensor.shape)}, config.json asks for {list(shape.shape)}",
                location=str(folder.path),
            )
        return tensor if dtype is None else safetensors_format.narrowed(key_of(shape), tensor, dtype)

    final = layout.step_directory(save, 0)
    partial = layout.partial_directory(save, 0)
    make_room(partial)
    try:
        facts = public_facts(
            config.model,
            iteration=0,
            consumed_samples=0,
            skipped=0,
            data_size=1,
            model_size=model_size,
            tokenizer_type=config.tokenizer.tokenizer_type,
            divisible_by=1,
            padded_vocab_size=rows,
        )
        summed = config.model.gpt_j_residual
        sizes = {"model_size": model_size, "pipe_size": pipe_size}
        written = write_weights(partial, table, full_tensor, summed=summed, facts=facts, **sizes)
        written.append(files.write_text(partial / layout.RESOLVED, serialize.to_json(config)))
        publish(partial, final, written)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Adopted(final, settings, len(table), rows)
