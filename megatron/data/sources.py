"""Which documents each split of a run reads, from the data section of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron.config.sections.data import DataSection
from megatron.data.blend import blend_order, samples_asked
from megatron.data.indexed import IndexedDataset
from megatron.data.splits import NAMES, split_documents, split_shares
from megatron.errors import ConfigError

LARGEST_BLEND = 255


@dataclass(frozen=True)
class Source:
    """A part of a split before its index map exists. drawn: samples a blend takes from it. name: for file names."""

    dataset: IndexedDataset
    documents: range
    weight: float
    name: str
    key: str
    asked: int = 0
    drawn: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the documents."""
        return int(self.dataset.sizes[self.documents.start : self.documents.stop].sum(dtype="int64"))


@dataclass(frozen=True)
class Split:
    """A split before its index maps exist. order: of the blend, where there are several sources (blend_order)."""

    name: str
    samples: int
    sources: tuple[Source, ...]
    order: tuple[np.ndarray, np.ndarray] | None = None


def read_splits(data: DataSection, wanted: dict[str, int]) -> tuple[list[Split], list[str]]:
    """The splits of which samples are wanted and that have documents, and warnings for the user.

    wanted: samples of each split. Raises ConfigError when no data is named, files are missing or training has no
    documents; RunError when a file is damaged.
    """
    splits, warnings = _named(data, {name: samples for name, samples in wanted.items() if samples > 0})
    return [_draw(split) for split in splits], warnings


def _named(data: DataSection, wanted: dict[str, int]) -> tuple[list[Split], list[str]]:
    lists = {name: (getattr(data, f"{name}_data_paths"), getattr(data, f"{name}_data_weights")) for name in NAMES}
    if data.data_path is not None:
        return _one_set(data.data_path, data.split, wanted)
    if not any(paths for paths, _ in lists.values()):
        raise ConfigError.of(
            "no data to train on",
            key="data_path",
            value=None,
            remedy="give data_path, or train_data_paths, valid_data_paths and test_data_paths",
        )
    if "train" in wanted and not lists["train"][0]:
        raise ConfigError.of("no training data", key="train_data_paths", value=None, remedy="name a data set")
    splits = [Split(name, samples, _listed(name, *lists[name])) for name, samples in wanted.items() if lists[name][0]]
    return splits, []


def _one_set(path: str, split: str, wanted: dict[str, int]) -> tuple[list[Split], list[str]]:
    shares = dict(zip(NAMES, split_shares(split), strict=True))
    dataset = IndexedDataset(path, key="data_path")
    dataset.check()
    found, warnings = [], []
    for name, documents in split_documents(split, len(dataset)).items():
        source = Source(dataset, documents, 1.0, name, "data_path")
        if name not in wanted or (shares[name] == 0 and name != "train"):
            continue
        if source.tokens:
            found.append(Split(name, wanted[name], (source,)))
        elif name == "train":
            what = f"it leaves no tokens for training of the {len(dataset)} documents of {path}"
            raise ConfigError.of(what, key="split", value=split, remedy="give training a larger share")
        else:
            warnings.append(f"split = {split!r} leaves none of the {len(dataset)} documents of {path} for {name}")
    return found, warnings


def _listed(name: str, paths: Sequence[str], weights: Sequence[float] | None) -> tuple[Source, ...]:
    key = f"{name}_data_paths"
    weights = weights or [1.0] * len(paths)
    if len(weights) != len(paths) or len(paths) > LARGEST_BLEND:
        raise ConfigError.of(
            f"{len(paths)} paths and {len(weights)} weights; as many of each are needed, and {LARGEST_BLEND} at most",
            key=key,
            value=list(paths),
        )
    if min(weights) < 0 or not sum(weights) > 0:
        what = "weights must be 0 or more, and one of them above 0"
        raise ConfigError.of(what, key=f"{name}_data_weights", value=list(weights))
    sources = []
    for number, (path, weight) in enumerate(zip(paths, weights, strict=True)):
        dataset = IndexedDataset(path, key=key)
        dataset.check()
        source = Source(dataset, range(len(dataset)), weight / sum(weights), f"{name}_{number}", key)
        if not source.tokens:
            raise ConfigError.of("this data set holds no tokens", key=key, value=path)
        sources.append(source)
    return tuple(sources)


def _draw(split: Split) -> Split:
    """The split with the number of samples that each source must be built for."""
    if len(split.sources) == 1:
        (only,) = split.sources
        # The public tools ask a listed set for a little more even when it stands alone, and the order follows from it.
        asked = split.samples if only.key == "data_path" else samples_asked(1.0, split.samples, split.samples)
        return replace(split, sources=(replace(only, asked=asked, drawn=split.samples),))
    order = blend_order([source.weight for source in split.sources], split.samples)
    sources = []
    for number, source in enumerate(split.sources):
        drawn = int((order[0] == number).sum())
        sources.append(replace(source, asked=samples_asked(source.weight, split.samples, drawn), drawn=drawn))
    return replace(split, sources=tuple(sources), order=order)
