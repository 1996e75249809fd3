"""A folder of `peft` with low-rank updates, read as adapters of ours beside the model that it belongs to.

Where one matrix of ours is several of theirs (queries, keys and values), their updates become one: A of all stand on
top of each other, and each B has columns of its own. Updates that share A, as exports of this project do, keep its
rank. All adapters of a model have one rank here; where an update needs less, the rest of A has random values and that
of B is zero, as at the start of training. Source of names and files: peft 0.21, utils/save_and_load.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.adapter_config import EMBEDDING, HEAD, MODULES, SAVED, TARGETS, LowRank
from megatron.checkpoint.format import files
from megatron.checkpoint.huggingface import safetensors_format
from megatron.checkpoint.huggingface.family import ModelFamily, TensorMapping
from megatron.checkpoint.huggingface.model_folder import HEADS, Folder
from megatron.checkpoint.huggingface.peft_adapter import WEIGHTS
from megatron.checkpoint.huggingface.peft_experts import (
    Updates,
    expert_factors,
    fused_matrices,
    random_down,
    take_updates,
)
from megatron.checkpoint.huggingface.peft_settings import CONFIG, PeftSettings
from megatron.errors import ConfigError, RunError
from megatron.param_table import DOWN, EXPERT_FACTORS, MAGNITUDE, UP, ModelDims

OLD_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."
_COPIES = ("modules_to_save.", "original_module.")
"""What peft's names of a trained copy of a module, and of what was there before, have before the name of a tensor."""


@dataclass(frozen=True)
class _Update:
    """The update of one matrix of theirs."""

    down: Tensor
    """A [r, in]."""
    up: Tensor
    """B [out, r], times the update's factor."""
    norms: Tensor | None = None
    """DoRA's norms of rows [out]."""


@dataclass(frozen=True)
class PeftAdapter:
    """The adapters of a folder, under our names."""

    low_rank: LowRank
    """What `lora` says of them."""
    tensors: Mapping[str, Tensor]
    """Our key -> values; matrices that were trained beside them too."""
    rows: int | None = None
    """Of embedding and output layer, where these have more than the model's [tokens]."""
    untied: bool = False
    """Whether these are two matrices where the model has one for both."""

    @property
    def settings(self) -> dict[str, Any]:
        """What it changes of the keys of the model."""
        changes: dict[str, Any] = {"lora": self.low_rank.block()}
        changes |= {} if self.rows is None else {"vocab_size": self.rows}
        return {**changes, **({"no_weight_tying": True} if self.untied else {})}


def read_adapter(path: Path, folder: Folder, dims: ModelDims) -> PeftAdapter:
    """Reads the folder of an adapter.

    Raises ConfigError for other adapters than plain low-rank updates, and RunError for updates of matrices that cannot
    have one here, each by its name.

    Args:
        path: The folder that peft wrote.
        folder: The model.
        dims: Its sizes, without adapters.
    """
    if dims.towers or folder.settings().get("train_impl"):
        kind = "encoder of questions or passages" if dims.towers else "encoder, or an encoder and decoder,"
        what = f"an adapter of an {kind} cannot be taken over: adapters are beside causal models here"
        raise ConfigError.of(what, location=str(path), hint="merge it into the model with peft (merge_and_unload)")
    settings = _settings(path)
    named = {folder.family.file_name(name): values for name, values in _named(path).items()}
    table = {row.ours.removesuffix(".weight"): row for row in folder.rows_of(dims)}
    matrices = fused_matrices(folder.family, dims)
    experts = take_updates(matrices, table, named, settings, folder.family)
    modules = {
        module: _updates_of(row, named, settings, folder.family)
        for module, row in table.items()
        if module.partition(".")[2] in MODULES and module.partition(".")[2] not in EXPERT_FACTORS
        if row.joined is None and row.written
    }
    saved = _saved(folder, dims, named, settings)
    if named:
        what = f"updates that have no place here: {', '.join(sorted(named)[:8])}"
        hint = "these may be adapted: " + ", ".join(TARGETS) + "; merge others into the model with peft"
        raise RunError.of(what, location=str(path), hint=hint)
    found = {module: parts for module, parts in modules.items() if parts}
    if not found and not experts:
        raise RunError.of("it has no low-rank update", location=str(path))
    rows = _added_rows(path, saved, folder, tied=dims.tied)
    asked = _low_rank(found, experts, settings, saved.names)
    targets = set(asked.modules()) - EXPERT_FACTORS.keys()
    shapes = {module: row for module, row in table.items() if module.partition(".")[2] in targets}
    values = dict(_factors(shapes, modules, asked, folder)) | dict(expert_factors(matrices, experts, asked))
    keys = {EMBEDDING: "0.word_embeddings.weight", HEAD: f"{dims.num_layers + 4}.final_linear.weight"}
    values |= {keys[name]: tensor for name, tensor in saved.tensors.items()}
    if saved.untied:  # the one that was not trained is that of the model
        for key in keys.values() - values.keys():
            values |= {key: folder.weights(dims).shards(keys[EMBEDDING])[0]}
    return PeftAdapter(asked, values, rows, saved.untied)


def _settings(path: Path) -> PeftSettings:
    if not (path / CONFIG).is_file() or not any((path / name).is_file() for name in (WEIGHTS, OLD_WEIGHTS)):
        what = f"it holds no {CONFIG} with {WEIGHTS} or {OLD_WEIGHTS}"
        raise ConfigError.of(what, location=str(path), hint="give a folder that peft's save_pretrained wrote")
    return PeftSettings.read(path)


def _named(path: Path) -> dict[str, Tensor]:
    """Its tensors by the names of the model's. RunError where a file of early releases holds anything else."""
    if (path / WEIGHTS).is_file():
        reader = safetensors_format.Reader(path / WEIGHTS)
        found = {name: reader.tensor(name) for name in reader.names()}
    else:
        found = files.read_tensors(path / OLD_WEIGHTS)
    if not isinstance(found, dict) or not all(isinstance(values, Tensor) for values in found.values()):
        raise RunError.of("this file holds no tensors by name", location=str(path / OLD_WEIGHTS))
    return {name.removeprefix(PREFIX): values for name, values in found.items()}


def _updates_of(
    row: TensorMapping, named: dict[str, Tensor], settings: PeftSettings, family: ModelFamily
) -> dict[str, _Update]:
    """Takes the updates of the matrices of a row out of `named`: name of the matrix -> update."""
    found = {}
    for name in row.theirs:
        module = name.removesuffix(".weight")
        down, up = (named.pop(f"{module}.{part}.weight", None) for part in ("lora_A", "lora_B"))
        if down is not None and up is not None:
            norms = named.pop(f"{module}.lora_magnitude_vector", None) if settings.magnitudes else None
            path = family.module_name(module)
            _require_rank(module, len(down), settings.rank_of(path))
            up = up.float() * settings.factor(path, len(down))
            found[name] = _Update(down.float(), up, None if norms is None else norms.float())
    return found


def _require_rank(module: str, rank: int, declared: int) -> None:
    """Raises RunError where a stored update has another rank than the file beside it says, as peft does."""
    if rank != declared:
        raise RunError.of(
            f"the update of {module} has rank {rank}, and {CONFIG} says {declared}, so its factor is not known",
            location=CONFIG,
            hint="write the rank into rank_pattern, and check lora_alpha: the factor is lora_alpha / rank",
        )


def _require_size(module: str, update: _Update, size: Sequence[int]) -> None:
    """Raises RunError where an update is not of a matrix of this size. size: (out, in)."""
    if (len(update.up), update.down.shape[1]) != tuple(size):
        shapes = f"A {list(update.down.shape)} and B {list(update.up.shape)}"
        what = f"the update of {module} is {shapes}, and the matrix of the model is {list(size)}"
        raise RunError.of(what, location=CONFIG, hint="give the model that the adapter was trained on (base_model)")


def _joined(updates: Sequence[_Update]) -> list[Tensor]:
    """Returns the matrices A that an adapter of ours needs for these updates: one where they share it."""
    first = updates[0].down
    return [first] if all(each.down.equal(first) for each in updates) else [each.down for each in updates]


def _low_rank(
    found: Mapping[str, Mapping[str, _Update]], experts: Updates, settings: PeftSettings, saved: tuple[str, ...]
) -> LowRank:
    ranks = [sum(map(len, _joined(list(parts.values())))) for parts in found.values()]
    rank = max(ranks + [len(one.down) for updates in experts.values() for one in updates.values()])
    inside, apart = {module.partition(".")[2] for module in found}, {one.target for one in experts}
    targets = tuple(name for name, ours in TARGETS.items() if inside.intersection(ours) or name in apart)
    magnitudes = any(each.norms is not None for parts in found.values() for each in parts.values())
    return LowRank(
        rank, round(settings.usual_factor * rank, 12), settings.dropout, targets, saved, magnitudes=magnitudes
    )


def _factors(
    rows: Mapping[str, TensorMapping], modules: Mapping[str, Mapping[str, _Update]], asked: LowRank, folder: Folder
) -> Iterator[tuple[str, Tensor]]:
    """A and B of every adapter of ours."""
    for module, row in rows.items():
        shapes = [folder.tensors[_stored(name, folder)]().shape for name in row.theirs]
        sizes = [shape[::-1] if row.turned else shape for shape in shapes]  # [out, in] of each of theirs
        updates = modules.get(module, {})
        for name, size in zip(row.theirs, sizes, strict=True):
            if name in updates:
                _require_size(name.removesuffix(".weight"), updates[name], size)
        downs = _joined(list(updates.values())) if updates else []
        down = random_down(module, asked.rank, sizes[0][1])
        ups = [torch.zeros(out, asked.rank) for out, _ in sizes]
        at = 0
        for part in downs:
            down[at : at + len(part)] = part
            at += len(part)
        at = 0
        for name, up in zip(row.theirs, ups, strict=True):
            if name in updates:
                width = updates[name].up.shape[1]
                up[:, at : at + width] = updates[name].up / asked.scale
                at += width if len(downs) > 1 else 0
        yield f"{module}.{DOWN}.weight", down
        yield f"{module}.{UP}.weight", row.together([up.T if row.turned else up for up in ups]).contiguous()
        if asked.magnitudes:
            norms = [_norms(updates.get(name), name, row, folder).unsqueeze(1) for name in row.theirs]
            joint = row.together([each.T if row.turned else each for each in norms])
            yield f"{module}.{MAGNITUDE}.weight", joint.reshape(-1).contiguous()


def _norms(update: _Update | None, name: str, row: TensorMapping, folder: Folder) -> Tensor:
    """Returns DoRA's norms of the rows of a matrix of theirs [out]; its own where it has no update."""
    if update is not None and update.norms is not None:
        return update.norms
    weight = folder.tensors[_stored(name, folder)]().float()
    return torch.linalg.vector_norm(weight, dim=0 if row.turned else 1)


def _stored(name: str, folder: Folder) -> str:
    """Returns the name under which a folder has a tensor; one of the bare model lacks the prefix."""
    return name if name in folder.tensors else name.removeprefix(folder.family.prefix)


@dataclass(frozen=True)
class _Saved:
    """Embedding and output layer of an adapter."""

    tensors: Mapping[str, Tensor]
    """Our name of each -> values."""
    names: tuple[str, ...]
    """Those that were trained."""
    untied: bool = False
    """Whether they are two matrices where the model has one for both."""


def _saved(folder: Folder, dims: ModelDims, named: dict[str, Tensor], settings: PeftSettings) -> _Saved:
    """Takes embedding and output layer out of `named`.

    Beside its trained copy a module may have what was there before, which peft keeps where rows were added.
    """
    keys = {"0.word_embeddings.weight": EMBEDDING, f"{dims.num_layers + 4}.final_linear.weight": HEAD}
    found: dict[str, Tensor] = {}
    replaced, before = set(), dict[str, Tensor]()
    for row in folder.rows_of(replace(dims, tied=False)):
        name = keys.get(row.ours)
        if name is None:
            continue
        for theirs in HEADS if row.theirs[0] in HEADS else row.theirs:
            module = theirs.removesuffix(".weight")
            own, copy, earlier = (named.pop(f"{module}.{part}weight", None) for part in ("", *_COPIES))
            if own is not None and copy is not None and not own.equal(copy):
                raise RunError.of(f"{theirs} and {module}.{_COPIES[0]}weight are other matrices")
            values = own if own is not None else copy
            if values is not None:
                found[name] = values
                replaced |= {name} if settings.replaces(folder.family.module_name(module)) else set()
            if earlier is not None:
                before[name] = earlier
    names = tuple(name for name in SAVED if name in found)
    if not dims.tied or not names:
        return _Saved(found, names)
    if len(names) == 1 and not replaced:  # peft writes it over the one matrix that is both
        return _Saved({EMBEDDING: found[names[0]]}, (EMBEDDING,))
    if len(names) > 1 and found[EMBEDDING].equal(found[HEAD]):
        return _Saved({EMBEDDING: found[EMBEDDING]}, (EMBEDDING,))
    if folder.family.encoder_decoder:
        what = "the adapter has trained one of embedding and output layer alone, which are one matrix here"
        raise RunError.of(what, hint="train it with ensure_weight_tying: true, or merge it into an untied model")
    shared = {name: values for values in before.values() for name in SAVED}  # what was both before
    return _Saved({**shared, **found}, names, untied=True)


def _added_rows(path: Path, saved: _Saved, folder: Folder, *, tied: bool) -> int | None:
    """Returns the rows of embedding and output layer where the adapter has more than the model; None where it has not.

    RunError where one matrix has others than the other, or than the model.
    """
    rows = {name: len(values) for name, values in saved.tensors.items()}
    if all(size == folder.rows for size in rows.values()):
        return None
    asked = (EMBEDDING,) if tied and not saved.untied else SAVED
    sizes = {name: rows.get(name, folder.rows) for name in asked}
    if len(set(sizes.values())) > 1 or min(sizes.values()) < folder.rows:
        counted = " and ".join(f"{size:,} rows of the {name}" for name, size in sizes.items())
        raise RunError.of(
            f"with the adapter there are {counted}, and the model has {folder.rows:,}",
            location=str(path),
            hint="give the model the rows that it had in training, by resize_token_embeddings, and save it",
        )
    return max(sizes.values())
