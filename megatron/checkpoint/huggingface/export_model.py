"""A checkpoint of ours as a folder that `transformers` loads: safetensors, their index and config.json.

The tensors are made one by one while the files are written, so the memory needed is about one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.format import files
from megatron.checkpoint.format.optimizer_shards import VOCABULARY
from megatron.checkpoint.format.weight_shards import key_of
from megatron.checkpoint.huggingface import safetensors_format
from megatron.checkpoint.huggingface.families import family_for
from megatron.checkpoint.huggingface.family import TensorMapping
from megatron.checkpoint.huggingface.fold_mup import fold, fold_misfits
from megatron.checkpoint.huggingface.model_folder import CONFIG, INDEX, SINGLE
from megatron.checkpoint.huggingface.safetensors_format import Promise
from megatron.checkpoint.load.stored_model import StoredModel
from megatron.checkpoint.offline.merge_lora import merged
from megatron.config.schema.model import ModelSection
from megatron.errors import ConfigError
from megatron.param_table import ModelDims, Multipliers, TensorShape, tensors

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CALLED = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class ExportOptions:
    """What changes no result and some programs that read the folder need."""

    zero_biases: bool = False
    """Attention has biases, of 0 where the model has none."""
    own_head: bool = False
    """The output layer is written as a matrix of its own, where it is the embedding."""

    def applied(self, model: ModelSection) -> ModelSection:
        """The model section that the folder describes."""
        changes = {"use_bias_in_attn_linear": True} if self.zero_biases else {}
        changes |= {"no_weight_tying": True} if self.own_head else {}
        return model.model_copy(update=changes)


PLAIN = ExportOptions()


@dataclass(frozen=True)
class Exported:
    """What was written."""

    family: str
    """Name of the family."""
    architecture: str
    """Class of transformers."""
    tensors: int
    """Number of tensors."""
    size: int
    """Size of all weight files [bytes]."""
    rows: int
    """Of the embedding. names: of the family and its class in transformers."""


def export(
    stored: StoredModel,
    output: Path,
    *,
    family_name: str | None = None,
    precision: str = "auto",
    largest_file: int = 5 << 30,
    special: Mapping[str, Any] | None = None,
    tokens: int | None = None,
    options: ExportOptions = PLAIN,
    tower: int = 0,
) -> Exported:
    """Writes the folder.

    Raises ConfigError naming each key that the family cannot express.

    Args:
        stored: The checkpoint.
        output: The folder to write.
        family_name: None chooses the first family that can express the model.
        precision: Auto keeps each tensor's, as transformers does, and config.json names the embedding's; fp32 takes the
            optimizer's fp32 copies where they were kept. The factors of muP go into the weights, and so do low-rank
            updates.
        largest_file: [bytes].
        special: Ids for config.json, such as eos_token_id.
        tokens: Of the tokenizer; further rows of the embedding are padding, unless the key vocab_size counts them.
        options: For other programs.
        tower: Of a model that embeds queries and passages: 0 for the encoder of queries, 1 for that of passages.
    """
    ConfigError.raise_any(fold_misfits(stored.mup, stored.model))
    stored = merged(stored)
    model = options.applied(stored.model)
    family = family_for(model, stored.moe, stored.mixers, family_name, stored.architecture)
    dims = ModelDims.of(model, stored.moe, stored.mixers)
    first = dims.tower_layers * tower if dims.towers > 1 else 0
    if dims.towers:
        dims = replace(dims, towers=1)
    if tower:
        assert family.passages is not None
        family = family.passages
    rows = vocabulary(stored, tokens)
    dtype = PRECISIONS.get(precision)
    shapes = {key_of(shape): shape for shape in tensors(dims, stored.rows)}
    table = family.table(dims)
    assert {row.ours for row in table} == set(shapes), "the table of a family covers every tensor of its models"
    output.mkdir(parents=True, exist_ok=True)
    held = {f"{shape.layer - first}.{shape.name}": shape for shape in stored.table}
    promises = [
        promise for row in table if row.written for promise in _promises(stored, held, row, shapes, rows, dtype)
    ]
    _write_files(output, promises, largest_file)
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= family.config(model, rows)
    config |= family.experts.config(model, stored.moe) if family.experts else {}
    config |= family.mixers.config(model, stored.mixers) if family.mixers else {}
    config |= {"pad_token_id": None} if family.class_pads else {}
    if stored.labels:
        config["id2label"] = {str(number): label for number, label in enumerate(stored.labels)}
        config["label2id"] = {label: number for number, label in enumerate(stored.labels)}
    config |= dict(special or {}) | {"torch_dtype": _CALLED[dtype or _stored_dtype(stored, stored.table[0])]}
    files.write_json(output / CONFIG, config)
    return Exported(family.name, family.architecture, len(promises), sum(promise.size for promise in promises), rows)


def _promises(
    stored: StoredModel,
    held: Mapping[str, TensorShape],
    row: TensorMapping,
    shapes: Mapping[str, TensorShape],
    rows: int,
    asked: torch.dtype | None,
) -> Iterator[Promise]:
    """Their tensors that a row of the table turns into.

    Args:
        stored: The checkpoint.
        held: Our key -> the stored tensor.
        row: Of the table.
        shapes: Our key -> the tensor that the folder describes.
        rows: Of the embedding.
        asked: Type of theirs; None keeps that of ours.
    """
    shape = shapes[row.ours]
    source = held.get(row.ours)
    if source is None and shape.kind == "head":
        source = held["0.word_embeddings.weight"]
    asked = None if shape.kind == "buffer" else asked  # transformers keeps them in fp32 too
    dtype = asked or _stored_dtype(stored, stored.table[0] if source is None else source)
    ours = _without_padding(shape, torch.empty(shape.shape, device="meta"), rows)
    if row.joined is not None:
        made = row.joined(ours, torch.empty(shapes[row.beside].shape, device="meta"))
        for part, theirs in enumerate(made):
            make = partial(_make_joined, stored, row, (held[row.ours], held[row.beside]), part, dtype == torch.float32)
            yield Promise(row.theirs[part], tuple(theirs.shape), dtype, make)
        return
    for part, theirs in enumerate(row.apart(ours)):
        if source is None:
            make = partial(_zeros, row, shape, part)
        else:
            make = partial(_make, stored, row, source, rows, part, dtype == torch.float32)
        yield Promise(row.theirs[part], tuple(theirs.shape), dtype, make)


def _stored_dtype(stored: StoredModel, shape: TensorShape) -> torch.dtype:
    return stored.weights.shards(key_of(shape))[0].dtype


def vocabulary(stored: StoredModel, tokens: int | None) -> int:
    """Rows of the embedding that mean a token. tokens: of the tokenizer, where it is known.

    The key vocab_size counts where it says more: a model that was taken over may have rows that no token of its
    tokenizer has, and keeps them.
    """
    sizes = [size for size in (tokens, stored.tokenizer.vocab_size) if size is not None and size <= stored.rows]
    return max(sizes, default=stored.rows)


def _make(stored: StoredModel, row: TensorMapping, shape: TensorShape, rows: int, part: int, precise: bool) -> Tensor:
    dims = ModelDims.of(stored.model, stored.moe, stored.mixers)
    full = _without_padding(shape, stored.full_tensor(shape, precise=precise), rows)
    return row.apart(fold(shape, full, dims, Multipliers.of(stored.mup, dims)))[part]


def _make_joined(
    stored: StoredModel, row: TensorMapping, shapes: tuple[TensorShape, TensorShape], part: int, precise: bool
) -> Tensor:
    assert row.joined is not None
    dims = ModelDims.of(stored.model, stored.moe, stored.mixers)
    multipliers = Multipliers.of(stored.mup, dims)
    ours = (fold(shape, stored.full_tensor(shape, precise=precise), dims, multipliers) for shape in shapes)
    return row.joined(*ours)[part]


def _zeros(row: TensorMapping, shape: TensorShape, part: int) -> Tensor:
    return row.apart(torch.zeros(shape.shape))[part]


def _without_padding(shape: TensorShape, full: Tensor, rows: int) -> Tensor:
    return full[:rows] if shape.kind in VOCABULARY else full


def _write_files(output: Path, promises: list[Promise], largest: int) -> None:
    """One file, or several with an index."""
    parts: list[list[Promise]] = [[]]
    size = 0
    for promise in promises:
        if parts[-1] and size + promise.size > largest:
            parts.append([])
            size = 0
        parts[-1].append(promise)
        size += promise.size
    if len(parts) == 1:
        safetensors_format.write(output / SINGLE, parts[0], {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        safetensors_format.write(output / name, part, {"format": "pt"})
        weight_map |= {promise.name: name for promise in part}
    total = sum(promise.size for promise in promises)
    files.write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
