"""A folder as `transformers` writes it, read as weights of ours: config.json, and safetensors or .bin files.

Nothing is copied before it is asked for, and no code of the folder runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.format import files
from megatron.checkpoint.format.weight_shards import StoredWeights
from megatron.checkpoint.huggingface import safetensors_format
from megatron.checkpoint.huggingface.config_defaults import completed
from megatron.checkpoint.huggingface.families import family_of
from megatron.checkpoint.huggingface.family import ModelFamily, Settings, TensorMapping
from megatron.checkpoint.huggingface.mxfp4 import unpacked
from megatron.checkpoint.huggingface.safetensors_format import FETCH
from megatron.checkpoint.load.tower_weights import BothTowers
from megatron.errors import ConfigError, ConfigIssue, RunError
from megatron.param_table import ModelDims

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_SINGLE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

ADAPTER = "adapter_config.json"
UNPACKED = ("gguf", "mxfp4")
"""Kinds of quantization that a folder names although its weights are plain, or are unpacked when they are read."""
_FETCH_BIN = f"{FETCH}, or the folder's {SINGLE}"
WRAPPERS = ("_orig_mod.: torch.compile", "module.: DDP and DeepSpeed", "base_model.model.: peft")
"""What programs put before the names of a model that they wrap."""
SHARED_COPIES = (".embed_tokens.weight", ".shared_head.head.weight")
"""What blocks that predict further tokens repeat of the model."""
STORES_HEAD = "stores_head"
"""What `settings` of a family reads beside config.json: whether the files hold an output layer."""
HEADS = ("lm_head.weight", "embed_out.weight")

Source = Callable[[], Tensor]
Table = dict[str, tuple[TensorMapping, tuple[Source, ...]]]


def is_folder(path: Path) -> bool:
    """Whether it is such a folder."""
    return (path / CONFIG).is_file() and any((path / name).is_file() for name in (SINGLE, INDEX, OLD_SINGLE, OLD_INDEX))


@dataclass(frozen=True)
class Folder:
    """Such a folder."""

    path: Path
    """The folder."""
    config: dict[str, Any]
    """The content of config.json, completed."""
    family: ModelFamily
    """The family of its model."""
    tensors: dict[str, Source]
    """Name -> how to read it."""
    passages: Folder | None = None
    """The encoder of passages beside one of questions, both of which are one model; its config.json says the same."""

    @staticmethod
    def open(path: Path) -> Folder:
        """Reads what describes the weights. Raises ConfigError for a folder or a model of another kind."""
        if not is_folder(path):
            if (path / ADAPTER).is_file():
                raise ConfigError.of(
                    "this folder holds an adapter of peft, and not the model that it changes",
                    location=str(path),
                    hint="load both with peft, call merge_and_unload() and save_pretrained, and give that folder",
                )
            if (path / CONFIG).is_file() and any(path.glob("model-*-of-*.safetensors")):
                what = f"the weights are in several files, and {INDEX}, which lists them, is missing"
                raise ConfigError.of(what, location=str(path), hint=f"{FETCH} into this folder")
            raise ConfigError.of(
                f"it holds no {CONFIG} with {SINGLE}, {INDEX}, {OLD_SINGLE} or {OLD_INDEX}",
                location=str(path),
                hint="give a folder that transformers' save_pretrained wrote, or a snapshot of the Hub",
            )
        location = str(path / CONFIG)
        config = files.read_object(path / CONFIG)
        family = family_of(config, location)
        ConfigError.raise_any(_changes_weights(path, config))
        if not family.encoder:
            _refuse_later_tokens(config, location)
        sources = unpacked(_sources(path, family.spare))
        return Folder(path, completed(config, family.model_type, location), family, sources)

    def settings(self) -> Settings:
        """The model as our keys."""
        return self.family.settings({**self.config, STORES_HEAD: any(name in self.tensors for name in HEADS)})

    @property
    def rows(self) -> int:
        """Rows of its embedding, from config.json; reading the weights compares."""
        return int(self.config["vocab_size"])

    def rows_of(self, dims: ModelDims) -> list[TensorMapping]:
        """The rows of the family's table for this folder."""
        family = self.family
        return (family.table if family.table_of is None else family.table_of(self.config))(dims)

    def weights(self, dims: ModelDims, *, new_head: bool = False) -> StoredWeights:
        """Its weights under our keys. RunError when it holds tensors that no place of ours takes.

        dims: of the model. new_head: the output layer may lack tensors, which begin anew.
        """
        own = FolderWeights.of(self, dims, new_head=new_head)
        if self.passages is None:
            return own
        return BothTowers(own, self.passages.weights(dims, new_head=new_head), dims.tower_layers)


@dataclass(frozen=True)
class FolderWeights:
    """The weights of a folder under our keys, as one tensor-parallel rank would have stored them."""

    directory: Path
    """The folder."""
    table: Table
    """Tensors of the model."""
    model_size: int = 1
    """Tensor-parallel degree; always 1."""

    @staticmethod
    def of(folder: Folder, dims: ModelDims, *, new_head: bool = False) -> FolderWeights:
        """Pairs the table of the family with the tensors that are there.

        folder: which has them. dims: of the model. new_head: the output layer may lack tensors.
        """
        head = f"{dims.num_layers + 4}." if new_head else None
        named = _named(folder, dims.mtp_layers)
        rows = folder.rows_of(dims)
        _name_tied_embedding(folder, rows, named)
        _drop_copies(folder, named)
        table: Table = {}
        lacked: list[str] = []
        taken: set[str] = set()
        for row in rows:
            lacking = [name for name in row.theirs if _old_head(name, named) not in named]
            lacked += [] if head is not None and row.ours.startswith(head) else lacking
            if not lacking:
                spelt = [_old_head(name, named) for name in row.theirs]
                table[row.ours] = (row, tuple(named[name] for name in spelt))
                taken |= set(spelt)  # several rows may read one tensor
        RunError.raise_any(_wrapped(lacked, folder) or [_missing(name, folder) for name in lacked])
        heads = folder.family.heads
        named = {name: source for name, source in named.items() if name not in taken and not name.startswith(heads)}
        _compare_rows(folder, table)
        _spare_head(folder, named, table)
        if named:
            raise RunError.of(
                f"tensors that the model has no place for: {', '.join(sorted(named)[:8])}",
                location=str(folder.path),
                hint="its config.json belongs to another model",
            )
        return FolderWeights(folder.path, table)

    def keys(self) -> set[str]:
        """Our keys of all its tensors."""
        return set(self.table)

    def shards(self, key: str) -> list[Tensor]:
        """The one tensor. RunError when two tensors that must be equal are not, or when parts of it do not fit."""
        row, sources = self.table[key]
        parts = [source() for source in sources]
        if row.copies and not all(part.equal(parts[0]) for part in parts):
            raise RunError.of(f"{' and '.join(row.theirs)} differ", location=str(self.directory))
        try:
            return [row.together(parts)]
        except (RuntimeError, IndexError, ValueError) as error:  # of torch, where a shape is not that of config.json
            found = ", ".join(f"{name} {list(part.shape)}" for name, part in zip(row.theirs, parts, strict=True))
            what = f"the shapes are not those that {CONFIG} asks for: {found}"
            raise RunError.of(what, location=str(self.directory), hint=f"compare {CONFIG} with the weights") from error


def _named(folder: Folder, further: int) -> dict[str, Source]:
    """Its tensors by full name, without those that hold no weights."""
    prefix = folder.family.prefix
    bare = not any(name.startswith(prefix) for name in folder.tensors)
    return {
        _renamed(prefix + name if bare else name): source
        for name, source in folder.tensors.items()
        if not name.endswith(folder.family.spare)
        and not name.startswith(folder.family.spare_modules)
        and not _is_behind(folder, name, further)
    }


def _renamed(name: str) -> str:
    """Returns today's name of a tensor: norms of the first BERT models have gamma and beta."""
    return name.replace(".LayerNorm.gamma", ".LayerNorm.weight").replace(".LayerNorm.beta", ".LayerNorm.bias")


def _is_behind(folder: Folder, name: str, further: int) -> bool:
    """Whether a tensor is left out of blocks behind the last one, which predict further tokens.

    further: blocks of these that are wanted; their copies of embedding and output layer are not.
    """
    block = re.search(r"layers\.(\d+)\.", name) if folder.family.spare_blocks else None
    behind = -1 if block is None else int(block[1]) - folder.config["num_hidden_layers"]
    return behind >= further or (behind >= 0 and name.endswith(SHARED_COPIES))


def _name_tied_embedding(folder: Folder, rows: Sequence[TensorMapping], named: dict[str, Source]) -> None:
    """Takes a stored output layer for the embedding, where the two are tied and only the former's name is stored.

    `save_model` of safetensors keeps one name of tensors that share memory: the first in order of the alphabet.
    """
    if not folder.config.get("tie_word_embeddings"):
        return
    (embedding,) = next(row.theirs for row in rows if row.ours == "0.word_embeddings.weight")
    stored = next((head for head in HEADS if head in named), None)
    if embedding not in named and stored is not None:
        named[embedding] = named.pop(stored)


def _drop_copies(folder: Folder, named: dict[str, Source]) -> None:
    """Takes one of the names under which files hold a tensor twice. ConfigError where the two differ.

    Releases of transformers then leave them apart, which a model here cannot.
    """
    for second, first in folder.family.copies.items():
        if second not in named:
            continue
        copy = named.pop(second)
        if first not in named:
            named[first] = copy
        elif not named[first]().equal(copy()):
            what = f"the stored {second} is not {first}, and the model has one tensor for both"
            hint = "transformers uses both as they are: such a model cannot be taken over"
            raise ConfigError.of(what, location=str(folder.path), hint=hint)


def _old_head(name: str, named: dict[str, Source]) -> str:
    """GPT-NeoX's output layer has two names, by the version that wrote it."""
    return "lm_head.weight" if name == "embed_out.weight" and name not in named else name


def _changes_weights(path: Path, config: dict[str, Any]) -> Iterator[ConfigIssue]:
    """What would be done to the stored weights before they are used, and is not done here."""
    where = str(path / CONFIG)
    settings = config.get("quantization_config")
    if settings and not (isinstance(settings, dict) and settings.get("quant_method") in UNPACKED):
        hint = "load it with transformers, call dequantize() and save_pretrained, and give that folder"
        yield ConfigIssue("quantized weights cannot be taken over", "quantization_config", settings, where, hint)
    if (path / ADAPTER).is_file():
        what = "transformers puts this adapter on top of the weights, which is not done here"
        yield ConfigIssue(what, location=str(path / ADAPTER), hint="merge it with peft, or take it out of the folder")


def _refuse_later_tokens(config: dict[str, Any], location: str) -> None:
    """Raises ConfigError where transformers would let a token attend to those behind it."""
    if not config.get("is_causal", True):
        what = "transformers attends to later tokens as well then, and only causal attention can be taken over"
        raise ConfigError.of(what, key="is_causal", value=config["is_causal"], location=location)


def _wrapped(lacked: list[str], folder: Folder) -> list[ConfigIssue]:
    """The issue where every missing tensor is there under one more prefix, as wrappers of models save them."""
    for name in folder.tensors:
        prefix = name.removesuffix(lacked[0]) if lacked else name
        if lacked and prefix != name and {prefix + each for each in lacked} <= folder.tensors.keys():
            what = f"its tensors are called {prefix}{lacked[0]} and so on, where the model has {lacked[0]}"
            hint = f"save the model inside its wrapper, or take {prefix} off the names ({', '.join(WRAPPERS)})"
            return [ConfigIssue(what, location=str(folder.path), hint=hint)]
    return []


def _missing(name: str, folder: Folder) -> ConfigIssue:
    what = f"there is no tensor {name}"
    if name in HEADS:
        hint = "a model whose output layer is its embedding says tie_word_embeddings: true"
        return ConfigIssue(f"{what}, and tie_word_embeddings is false", location=str(folder.path), hint=hint)
    hint = f"a file that the index does not name, or another model's config.json; {FETCH}"
    return ConfigIssue(what, location=str(folder.path), hint=hint)


def _compare_rows(folder: Folder, table: Table) -> None:
    """ConfigError where embedding or output layer have other rows than config.json says, which nothing may pad."""
    for key, (row, sources) in table.items():
        if key == "0.word_embeddings.weight" or key.endswith(".final_linear.weight"):
            rows = sources[0]().shape[0]
            if rows != folder.rows:
                raise ConfigError.of(
                    f"tensor {row.theirs[0]} has {rows:,} rows",
                    key="vocab_size",
                    value=folder.rows,
                    location=str(folder.path / CONFIG),
                    hint=f"write vocab_size: {rows} if the tensor is right"
                    if rows
                    else "the tensor is empty, as ZeRO stage 3 saves what it does not gather: save the gathered model",
                )


def _spare_head(folder: Folder, named: dict[str, Source], table: Table) -> None:
    """Drops a second copy of a tied embedding, which some files hold. ConfigError where it is another matrix."""
    if any(key.endswith("final_linear.weight") for key in table):
        return
    for head in HEADS:
        if head not in named:
            continue
        if not named[head]().equal(table["0.word_embeddings.weight"][1][0]()):
            raise ConfigError.of(
                f"the stored {head} is not the embedding; some releases of transformers use it, others drop it",
                key="tie_word_embeddings",
                value=folder.config["tie_word_embeddings"],
                location=str(folder.path / CONFIG),
                hint=f"write tie_word_embeddings: false to keep {head}, or take that tensor out",
            )
        del named[head]


def _sources(path: Path, spare: str | tuple[str, ...]) -> dict[str, Source]:
    """Every tensor of the folder and how to read it.

    RunError where two files hold a tensor of one name with other values: programs differ in which one they take, and
    some do not look at the index. spare: ends of the names of tensors that hold no weights.
    """
    if (path / INDEX).is_file() or (path / SINGLE).is_file():
        readers = {name: safetensors_format.Reader(path / name) for name in _files(path, SINGLE, INDEX)}
        named = {name: {each: _of(reader, each) for each in reader.names()} for name, reader in readers.items()}
    else:
        found = {name: _old_tensors(path / name) for name in _files(path, OLD_SINGLE, OLD_INDEX)}
        named = {name: {each: _held(value) for each, value in tensors.items()} for name, tensors in found.items()}
    sources: dict[str, Source] = {}
    owner: dict[str, str] = {}
    for file, tensors_of in named.items():
        for tensor, source in tensors_of.items():
            if tensor in sources and not tensor.endswith(spare) and not _same(sources[tensor](), source()):
                raise RunError.of(
                    f"tensor {tensor} is in {owner[tensor]} and in {file}, with other values",
                    location=str(path),
                    hint="one is left from another version of the model: take the tensor out of the file that is wrong",
                )
            sources[tensor], owner[tensor] = source, file
    return sources


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, bit by bit: NaN is NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))


def _held(value: Tensor) -> Source:
    return lambda: value


def _of(reader: safetensors_format.Reader, tensor: str) -> Source:
    return lambda: reader.tensor(tensor)


def _files(path: Path, single: str, index: str) -> list[str]:
    """The files to read: as transformers, the whole one where there is one, an index or not."""
    if (path / single).is_file():
        return [single]
    settings = files.read_json(path / index)
    files_of = settings.get("weight_map") if isinstance(settings, dict) else None
    if not isinstance(files_of, dict) or not all(isinstance(name, str) for name in files_of.values()):
        what = "it has no weight_map, which says where each tensor is"
        raise RunError.of(what, location=str(path / index), hint=FETCH)
    names = sorted(set(files_of.values()))
    what = f"this file is not there, which {index} names"
    absent = [name for name in names if not (path / name).is_file()]
    RunError.raise_any(
        [ConfigIssue(what, location=str(path / name), hint=f"{FETCH} into this folder") for name in absent]
    )
    return names


def _old_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file. RunError where it is damaged, or a pickle of other things."""
    try:
        found = files.read_tensors(path)
    except RunError as error:
        raise RunError(*(replace(issue, hint=_FETCH_BIN) for issue in error.issues)) from error
    if not isinstance(found, dict):
        raise RunError.of("this file holds no tensors by name", location=str(path), hint=_FETCH_BIN)
    return found
