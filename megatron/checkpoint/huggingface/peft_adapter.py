"""What was trained beside a frozen model, as a folder that the package `peft` loads on top of that model.

Low-rank updates become LORA: one of ours whose matrix is several of theirs gives each its rows of B, and A to all of
them. What `modules_to_save` trained is written beside them. A soft prompt becomes PROMPT_TUNING. Source of names and
files: peft 0.21, utils/save_and_load.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.adapter_config import EMBEDDING, MODULES, OUT_PROJ, LowRank, low_rank, soft_prompt
from megatron.checkpoint.format import files
from megatron.checkpoint.huggingface import safetensors_format
from megatron.checkpoint.huggingface.export_model import PRECISIONS, Exported
from megatron.checkpoint.huggingface.families import family_for
from megatron.checkpoint.huggingface.family import ModelFamily, TensorMapping
from megatron.checkpoint.huggingface.peft_experts import expert_promises, fused_matrices, target_parameters
from megatron.checkpoint.huggingface.peft_modules import SavedModules
from megatron.checkpoint.huggingface.peft_settings import CONFIG
from megatron.checkpoint.huggingface.safetensors_format import Promise
from megatron.checkpoint.load.stored_model import StoredModel
from megatron.errors import ConfigError
from megatron.param_table import DOWN, MAGNITUDE, PROMPT, UP, ModelDims, TensorShape, is_adapter_tensor

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class ExportedAdapter(Exported):
    """What was written. rows: of the embedding, or of the base's where the adapter has none."""

    rows_added: bool = False
    """Whether the base may have other rows, and has to be given these first."""
    has_embedding: bool = False
    """Whether the embedding is among what was written."""


def export_adapter(
    stored: StoredModel,
    output: Path,
    *,
    family_name: str | None = None,
    precision: str = "auto",
    base_model: str | None = None,
    tokens: int | None = None,
) -> ExportedAdapter:
    """Writes the folder.

    Raises ConfigError where nothing was trained beside a frozen model, where its tokenizer has tokens that the base has
    no rows for and theirs were not trained, or naming each key that the family cannot express.

    Args:
        stored: The checkpoint.
        output: The folder to write.
        family_name: As for a whole model.
        precision: As for a whole model.
        base_model: The name or folder under which peft finds the frozen model by itself.
        tokens: Of the tokenizer, as for a whole model.
    """
    updates, prompt = low_rank(stored.model.lora), soft_prompt(stored.model.soft_prompt_tuning)
    if updates is None and prompt is None:
        raise ConfigError.of(
            "nothing was trained beside a frozen model here: neither lora nor soft_prompt_tuning is set",
            location=str(stored.directory),
            hint="leave --adapter-only out",
        )
    plain = stored.model.model_copy(update={"lora": None, "soft_prompt_tuning": None})
    family = family_for(plain, stored.moe, stored.mixers, family_name, stored.architecture)
    dims = ModelDims.of(plain, stored.moe, stored.mixers)
    if dims.towers:
        raise ConfigError.of(
            "updates of encoders of queries and passages are not written as a folder of peft",
            key="lora",
            location=str(stored.directory),
            hint="leave --adapter-only out to convert both encoders with their updates",
        )
    saved = SavedModules.of(stored, tokens, base_model)
    changed = next(shape for shape in stored.table if is_adapter_tensor(shape))
    asked = PRECISIONS.get(precision)
    dtype = asked or stored.full_tensor(changed).dtype
    if updates is not None:
        experts = fused_matrices(family, dims)
        promises = list(_factors(stored, family, dims, dtype))
        turned = any(row.turned for row in family.table(dims))
        settings = _lora(updates, promises, turned=turned, mixed=dims.mixture.experts > 1)
        if updates.of_experts:
            named = {*settings.get("target_parameters", ()), *target_parameters(experts, updates)}
            settings["target_parameters"] = sorted(named)
            promises += expert_promises(stored, experts, updates, dtype)
        settings |= saved.settings(family, dims)
        promises += saved.promises(family, dims, asked)
    else:
        promises = [_prompt(stored, dtype)]
        settings = _prompt_tuning(dims, promises[0].shape[0])
    output.mkdir(parents=True, exist_ok=True)
    safetensors_format.write(output / WEIGHTS, promises, {"format": "pt"})
    usual = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True}
    files.write_json(output / CONFIG, {**settings, **usual})
    size = sum(promise.size for promise in promises)
    facts = (family.name, str(settings["peft_type"]), len(promises), size, saved.rows)
    return ExportedAdapter(*facts, rows_added=saved.added, has_embedding=EMBEDDING in saved.names)


def _factors(stored: StoredModel, family: ModelFamily, dims: ModelDims, dtype: torch.dtype) -> Iterator[Promise]:
    """The tensors of all updates."""
    shapes = {f"{shape.layer}.{shape.name}": shape for shape in stored.table}
    for row in family.table(dims):
        module = row.ours.removesuffix(".weight")
        down, up = (shapes.get(f"{module}.{name}.weight") for name in (DOWN, UP))
        if down is None or up is None:
            continue
        if MODULES.get(module.partition(".")[2]) == OUT_PROJ:
            raise ConfigError.of(
                f"peft loads no update of out_proj in a model of the family {family.name}",
                key="lora",
                hint="leave --adapter-only out to convert the whole model",
            )
        if row.joined is not None or not row.written:
            raise ConfigError.of(
                f"the family {family.name} keeps {module.rpartition('.')[2]} and another matrix of ours as one, whose "
                "two updates are no single one",
                key="lora",
                hint="leave --adapter-only out to convert the whole model",
            )
        parts = _rows(row, torch.empty(up.shape, device="meta"))
        for part, name in enumerate(row.theirs):
            theirs = f"base_model.model.{family.module_name(name).removesuffix('.weight')}"
            first, second = partial(_down, stored, down, dtype), partial(_up, stored, row, up, part, dtype)
            yield Promise(f"{theirs}.lora_A.weight", down.shape, dtype, first)
            yield Promise(f"{theirs}.lora_B.weight", tuple(parts[part].shape), dtype, second)
            norms = shapes.get(f"{module}.{MAGNITUDE}.weight")
            if norms is not None:
                third = partial(_norms, stored, row, norms, part, dtype)
                yield Promise(f"{theirs}.lora_magnitude_vector", tuple(parts[part].shape[:1]), dtype, third)


def _rows(row: TensorMapping, up: Tensor) -> list[Tensor]:
    """The rows of B [out, rank] that belong to each of their matrices, which peft keeps as [out, rank] throughout."""
    return [part.T if row.turned else part for part in row.apart(up)]


def _down(stored: StoredModel, shape: TensorShape, dtype: torch.dtype) -> Tensor:
    return stored.full_tensor(shape, precise=dtype == torch.float32)


def _up(stored: StoredModel, row: TensorMapping, shape: TensorShape, part: int, dtype: torch.dtype) -> Tensor:
    return _rows(row, stored.full_tensor(shape, precise=dtype == torch.float32))[part]


def _norms(stored: StoredModel, row: TensorMapping, shape: TensorShape, part: int, dtype: torch.dtype) -> Tensor:
    return _rows(row, stored.full_tensor(shape, precise=dtype == torch.float32).unsqueeze(1))[part].squeeze(1)


_TAKEN_FOR_EXPERTS = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Modules whose names peft 0.21 takes for matrices of routed experts in a model that has experts, wherever they are."""


def _lora(asked: LowRank, promises: list[Promise], *, turned: bool, mixed: bool) -> dict[str, Any]:
    """Returns adapter_config.json's settings. Names are those in a block, since all blocks have the same.

    ConfigError for norms of rows of a matrix that peft reaches by its parameter alone.

    Args:
        asked: The updates.
        promises: Their tensors.
        turned: Whether the model stores matrices as [in, out].
        mixed: Whether the model has experts.
    """
    inside = {
        re.sub(r"^base_model\.model\..*?\.\d+\.|\.lora_([AB]\.weight|magnitude_vector)$", "", promise.name)
        for promise in promises
    }
    apart = {name for name in inside if mixed and name.rpartition(".")[2] in _TAKEN_FOR_EXPERTS}
    if apart and asked.magnitudes:
        raise ConfigError.of(
            f"peft has no norms of rows (dora) for {', '.join(sorted(apart))} in a model with experts",
            key="lora",
            hint="leave --adapter-only out to convert the whole model",
        )
    parameters = {"target_parameters": sorted(f"{name}.weight" for name in apart)} if apart else {}
    return {
        "peft_type": "LORA",
        "r": asked.rank,
        "lora_alpha": asked.alpha,
        "use_rslora": asked.rank_stabilized,
        "use_dora": asked.magnitudes,
        "lora_dropout": 0.0 if apart else asked.dropout,  # peft has no dropout for parameters
        "target_modules": sorted(inside - apart),
        **parameters,
        "fan_in_fan_out": turned,
        "bias": "none",
    }


def _prompt(stored: StoredModel, dtype: torch.dtype) -> Promise:
    shape = next(one for one in stored.table if one.layer == 0 and one.name == PROMPT)
    return Promise("prompt_embeddings", shape.shape, dtype, partial(_down, stored, shape, dtype))


def _prompt_tuning(dims: ModelDims, length: int) -> dict[str, Any]:
    return {
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "num_virtual_tokens": length,
        "token_dim": dims.hidden_size,
        "num_layers": dims.num_layers,
        "num_attention_heads": dims.num_attention_heads,
        "num_transformer_submodules": 1,
    }
