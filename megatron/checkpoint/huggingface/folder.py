"""A folder as `transformers` writes it, read as weights of ours: config.json, and safetensors or .bin files.

Nothing is copied before it is asked for, and no code of the folder runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint import files
from megatron.checkpoint.huggingface import safetensors
from megatron.checkpoint.huggingface.families import family_of
from megatron.checkpoint.huggingface.family import Correspondence, Family, Settings
from megatron.errors import ConfigError, Mistake, RunError
from megatron.shapes import ModelDims

CONFIG = "config.json"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_WHOLE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

Source = Callable[[], Tensor]


def is_folder(path: Path) -> bool:
    """Whether it is such a folder."""
    return (path / CONFIG).is_file() and any((path / name).is_file() for name in (WHOLE, INDEX, OLD_WHOLE, OLD_INDEX))


@dataclass(frozen=True)
class Folder:
    """Such a folder. config: the content of config.json. tensors: name -> how to read it."""

    path: Path
    config: dict[str, Any]
    family: Family
    tensors: dict[str, Source]

    @staticmethod
    def open(path: Path) -> Folder:
        """Reads what describes the weights. Raises ConfigError for a folder or a model of another kind."""
        if not is_folder(path):
            raise ConfigError.of(
                f"it holds no {CONFIG} with {WHOLE}, {INDEX}, {OLD_WHOLE} or {OLD_INDEX}",
                where=str(path),
                remedy="give a folder that transformers' save_pretrained wrote, or a snapshot of the Hub",
            )
        config = files.read_json(path / CONFIG)
        family = family_of(config, str(path / CONFIG))
        return Folder(path, config, family, _sources(path))

    def settings(self) -> Settings:
        """The model as our keys."""
        return self.family.settings(self.config)

    @property
    def rows(self) -> int:
        """Rows of its embedding."""
        return int(self.config["vocab_size"])

    def weights(self, dims: ModelDims) -> FolderWeights:
        """Its weights under our keys. RunError when it holds tensors that no place of ours takes."""
        return FolderWeights.of(self, dims)


@dataclass(frozen=True)
class FolderWeights:
    """The weights of a folder under our keys, as one tensor-parallel rank would have stored them."""

    directory: Path
    table: dict[str, tuple[Correspondence, tuple[Source, ...]]]
    model_size: int = 1

    @staticmethod
    def of(folder: Folder, dims: ModelDims) -> FolderWeights:
        """Pairs the table of the family with the tensors that are there."""
        named = _named(folder)
        table: dict[str, tuple[Correspondence, tuple[Source, ...]]] = {}
        missing: list[Mistake] = []
        for row in folder.family.table(dims):
            lacking = [name for name in row.theirs if _old_head(name, named) not in named]
            missing += [Mistake(f"there is no tensor {name}", where=str(folder.path)) for name in lacking]
            if not lacking:
                table[row.ours] = (row, tuple(named.pop(_old_head(name, named)) for name in row.theirs))
        RunError.raise_any(missing)
        _spare_head(named, table)
        if named:
            raise RunError.of(
                f"tensors that the model has no place for: {', '.join(sorted(named)[:8])}",
                where=str(folder.path),
                remedy="its config.json belongs to another model",
            )
        return FolderWeights(folder.path, table)

    def keys(self) -> set[str]:
        """Our keys of all its tensors."""
        return set(self.table)

    def shards(self, key: str) -> list[Tensor]:
        """The one tensor. RunError when two tensors that must be equal are not."""
        row, sources = self.table[key]
        parts = [source() for source in sources]
        if row.copies and not all(part.equal(parts[0]) for part in parts):
            raise RunError.of(f"{' and '.join(row.theirs)} differ", where=str(self.directory))
        return [row.together(parts)]


def _named(folder: Folder) -> dict[str, Source]:
    """Its tensors by full name, without those that hold no weights."""
    prefix = folder.family.prefix
    bare = not any(name.startswith(prefix) for name in folder.tensors)
    return {
        prefix + name if bare else name: source
        for name, source in folder.tensors.items()
        if not name.endswith(folder.family.spare)
    }


def _old_head(name: str, named: dict[str, Source]) -> str:
    """GPT-NeoX's output layer has two names, by the version that wrote it."""
    return "lm_head.weight" if name == "embed_out.weight" and name not in named else name


def _spare_head(named: dict[str, Source], table: dict[str, tuple[Correspondence, tuple[Source, ...]]]) -> None:
    """Drops a second copy of a tied embedding, which some files hold."""
    for head in ("lm_head.weight", "embed_out.weight"):
        tied = not any(key.endswith("final_linear.weight") for key in table)
        if head in named and tied and named[head]().equal(table["0.word_embeddings.weight"][1][0]()):
            del named[head]


def _sources(path: Path) -> dict[str, Source]:
    """Every tensor of the folder and how to read it."""
    if (path / INDEX).is_file() or (path / WHOLE).is_file():
        names = _files(path, WHOLE, INDEX)
        readers = {name: safetensors.Reader(path / name) for name in names}
        return {tensor: _of(reader, tensor) for reader in readers.values() for tensor in reader.names()}
    held: dict[str, Source] = {}
    for name in _files(path, OLD_WHOLE, OLD_INDEX):
        for tensor, value in files.read_tensors(path / name).items():
            held[tensor] = lambda value=value: value  # type: ignore[misc]
    return held


def _of(reader: safetensors.Reader, tensor: str) -> Source:
    return lambda: reader.tensor(tensor)


def _files(path: Path, whole: str, index: str) -> list[str]:
    if not (path / index).is_file():
        return [whole]
    return sorted(set(files.read_json(path / index)["weight_map"].values()))
