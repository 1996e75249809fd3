"""Which documents each split of a run reads, from the data section of a configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np

from megatron.config.schema.data import DataSection
from megatron.data.dataset.blend import blend_order, document_weights, samples_asked
from megatron.data.dataset.gpt_dataset import TokenSource
from megatron.data.dataset.splits import NAMES, split_documents, split_shares
from megatron.data.indexed.open_file_limit import allow_open_files
from megatron.data.indexed.reader import IndexedDataset
from megatron.errors import ConfigError

LARGEST_BLEND = 1 << 16
FILES_EACH = 10  # of a data set: tokens, labels and rewards with their indexes, and the arrays of an index map
EACH_VALID = "valid/"  # before the name of a validation set that has a split of its own
LABELS = {"train": "train_label_data_paths", "valid": "valid_label_data_paths", "test": "test_label_data_paths"}
REWARDS = {"train": "train_reward_data_paths", "valid": "valid_reward_data_paths", "test": "test_reward_data_paths"}


@dataclass(frozen=True)
class DataSource:
    """A part of a split before its index map exists."""

    data: TokenSource
    """The token files with labels and rewards."""
    documents: range
    """Range of the documents to use."""
    weight: float
    """Fraction of the samples."""
    name: str
    """For file names."""
    key: str
    """Of the configuration that names it."""
    asked: int | None = 0
    """Samples its map must give, or None where the passes decide."""
    drawn: int = 0
    """Samples a blend takes from it."""

    @property
    def dataset(self) -> IndexedDataset:
        """The tokens."""
        return self.data.tokens

    @property
    def tokens(self) -> int:
        """Tokens of one pass over the documents."""
        return int(self.dataset.sizes[self.documents.start : self.documents.stop].sum(dtype="int64"))


@dataclass(frozen=True)
class Split:
    """A split before its index maps exist."""

    name: str
    """train, valid or test."""
    samples: int
    """Samples that the run needs."""
    sources: tuple[DataSource, ...]
    """Datasets of the split."""
    order: tuple[np.ndarray, np.ndarray] | None = None
    """Of the blend, where there are several sources (blend_order)."""
    epochs: int = 0
    """Passes over all documents; 0 where the samples decide."""


def read_splits(
    data: DataSection,
    num_samples: dict[str, int],
    *,
    train_epochs: int | None = None,
    kind: type[IndexedDataset] = IndexedDataset,
) -> tuple[list[Split], list[str]]:
    """The splits of which samples are wanted and that have documents, and warnings for the user.

    With valid_loss_per_set each of several validation sets is a split of its own besides, named behind EACH_VALID.
    Raises ConfigError when no data is named, files are missing or training has no documents; RunError when a file is
    damaged.

    Args:
        data: Data sets and their splits.
        num_samples: Samples of each split.
        train_epochs: Passes that the training data is laid out for, whatever its samples; its blend, if there is one,
            is then left to later.
        kind: Class that opens the token files.
    """
    splits, warnings = _named(data, {name: samples for name, samples in num_samples.items() if samples > 0}, kind)
    if data.valid_loss_per_set:
        splits += [each for split in splits if split.name == "valid" for each in _each(split)]
    by_passes = {"train"} if train_epochs else set()
    return [
        _by_passes(split, train_epochs or 0) if split.name in by_passes else _draw(split) for split in splits
    ], warnings


def _each(split: Split) -> list[Split]:
    """A split of each of several sources, by what its path is called."""
    if len(split.sources) < 2:
        return []
    found: dict[str, Split] = {}
    for number, source in enumerate(split.sources):
        stem = PurePath(source.dataset.prefix).name.removesuffix("_document").removesuffix("_text")
        name = stem or f"_{number}"
        while name in found:
            name = f"{name}_{number}"
        found[name] = Split(f"{EACH_VALID}{name}", split.samples, (replace(source, weight=1.0),))
    return list(found.values())


def _named(data: DataSection, num_samples: dict[str, int], kind: type[IndexedDataset]) -> tuple[list[Split], list[str]]:
    lists = {name: getattr(data, f"{name}_data_paths") for name in NAMES}
    if data.data_path is not None:
        return _one_set(
            data.data_path, data.split, num_samples, _open(data.data_path, "data_path", data.data_impl, kind)
        )
    if not any(lists.values()):
        raise ConfigError.of(
            "no data to train on",
            key="data_path",
            value=None,
            hint="give data_path, or train_data_paths, valid_data_paths and test_data_paths",
        )
    if "train" in num_samples and not lists["train"]:
        raise ConfigError.of("no training data", key="train_data_paths", value=None, hint="name a data set")
    splits = [Split(name, samples, _listed(name, data, kind)) for name, samples in num_samples.items() if lists[name]]
    return splits, []


def _one_set(
    path: str, split: str, num_samples: dict[str, int], dataset: IndexedDataset
) -> tuple[list[Split], list[str]]:
    shares = dict(zip(NAMES, split_shares(split), strict=True))
    found, warnings = [], []
    for name, documents in split_documents(split, len(dataset)).items():
        source = DataSource(TokenSource(dataset), documents, 1.0, name, "data_path")
        if name not in num_samples or (shares[name] == 0 and name != "train"):
            continue
        if source.tokens:
            found.append(Split(name, num_samples[name], (source,)))
        elif name == "train":
            what = f"it leaves no tokens for training of the {len(dataset)} documents of {path}"
            raise ConfigError.of(what, key="split", value=split, hint="give training a larger share")
        else:
            warnings.append(f"split = {split!r} leaves none of the {len(dataset)} documents of {path} for {name}")
    return found, warnings


def _listed(name: str, data: DataSection, kind: type[IndexedDataset]) -> tuple[DataSource, ...]:
    key = f"{name}_data_paths"
    paths = getattr(data, key)
    opened = [
        TokenSource(
            _open(path, key, data.data_impl, kind),
            _companion(data, LABELS[name], number),
            _companion(data, REWARDS[name], number),
        )
        for number, path in enumerate(_counted(data, name, paths))
    ]
    weights = getattr(data, f"{name}_data_weights") or [1.0] * len(paths)
    if data.weight_by_num_documents:
        weights = document_weights([len(source.tokens) for source in opened], data.weighted_sampler_alpha)
    sources = []
    for number, (source, weight) in enumerate(zip(opened, weights, strict=True)):
        _check_companions(source, name)
        made = DataSource(source, range(len(source.tokens)), weight / sum(weights), f"{name}_{number}", key)
        if not made.tokens:
            raise ConfigError.of("this data set holds no tokens", key=key, value=source.tokens.prefix)
        sources.append(made)
    return tuple(sources)


def _counted(data: DataSection, name: str, paths: Sequence[str]) -> Sequence[str]:
    """The paths, when there are as many of everything that goes with them."""
    key, weights = f"{name}_data_paths", getattr(data, f"{name}_data_weights") or [1.0] * len(paths)
    if len(weights) != len(paths):
        what = f"{len(paths)} paths and {len(weights)} weights; as many of each are needed"
        raise ConfigError.of(what, key=f"{name}_data_weights")
    if len(paths) > LARGEST_BLEND:
        hint = "merge some of them with tools/merge_datasets.py"
        raise ConfigError.of(f"{len(paths)} data sets; {LARGEST_BLEND} at most are mixed", key=key, hint=hint)
    allow_open_files(FILES_EACH * len(paths))
    for companions in (LABELS[name], REWARDS[name]):
        others = getattr(data, companions)
        if others is not None and len(others) != len(paths):
            what = f"{len(others)} paths beside {len(paths)} {key}; as many of each are needed"
            raise ConfigError.of(what, key=companions)
    if min(weights) < 0 or not sum(weights) > 0:
        what = "weights must be 0 or more, and one of them above 0"
        raise ConfigError.of(what, key=f"{name}_data_weights", value=list(weights))
    _check_named_once(data, name, paths)
    return paths


def _check_named_once(data: DataSection, name: str, paths: Sequence[Any]) -> None:
    """Raises ConfigError where two sources of a split are the same files, links followed."""
    first: dict[tuple[str, ...], int] = {}
    companions = [getattr(data, key) or [None] * len(paths) for key in (LABELS[name], REWARDS[name])]
    for number, prefixes in enumerate(zip(paths, *companions, strict=True)):
        files = tuple(os.path.realpath(f"{prefix}.bin") if isinstance(prefix, str) else "" for prefix in prefixes)
        if files[0] and files in first:
            other = paths[first[files]]
            named = "the same files" if paths[number] == other else f"the same files as {other}"
            raise ConfigError.of(
                f"{named} are named twice: their samples would come twice in a row, in the same order",
                key=f"{name}_data_paths",
                value=paths[number],
                hint=f"name them once, with the sum of their weights in {name}_data_weights",
            )
        first.setdefault(files, number)


def _open(path: Any, key: str, impl: str, kind: type[IndexedDataset] = IndexedDataset) -> IndexedDataset:
    if not isinstance(path, str):
        raise ConfigError.of("this is no path", key=key, value=path, hint="give the prefix of .bin and .idx files")
    dataset = kind(path, key=key)
    own = "cached" if dataset.legacy else "mmap"
    if impl not in ("infer", own):
        what = f"{path}.idx has the {'legacy' if dataset.legacy else 'memory-mapped'} format, which is {own}"
        raise ConfigError.of(what, key="data_impl", value=impl, hint="leave it out; the file says its format")
    dataset.check()
    return dataset


def _companion(data: DataSection, key: str, number: int) -> IndexedDataset | None:
    """The labels or rewards of one data set; None where there are none, which a null in the list says too."""
    path = (getattr(data, key) or {number: None})[number]
    return None if path is None else _open(path, key, data.data_impl)


def _check_companions(source: TokenSource, name: str) -> None:
    """Raises ConfigError unless labels and rewards are those of these documents."""
    tokens, labels, rewards = source.tokens, source.labels, source.rewards
    if labels is not None and not np.array_equal(labels.sizes, tokens.sizes):
        what = f"its documents have other lengths than those of {tokens.prefix}, which it should label token by token"
        hint = "make both in one run of the preprocessing"
        raise ConfigError.of(what, key=LABELS[name], value=labels.prefix, hint=hint)
    if rewards is not None and (len(rewards) != len(tokens) or (len(rewards) and int(rewards.sizes.min()) < 1)):
        what = f"it does not hold a number for each of the {len(tokens)} documents of {tokens.prefix}"
        raise ConfigError.of(what, key=REWARDS[name], value=rewards.prefix)


def _by_passes(split: Split, epochs: int) -> Split:
    """The split as whole passes over every source."""
    return replace(split, epochs=epochs, sources=tuple(replace(source, asked=None) for source in split.sources))


def _draw(split: Split) -> Split:
    """The split with the number of samples that each source must be built for."""
    if len(split.sources) == 1:
        (only,) = split.sources
        # The public tools ask a listed set for a little more even when it is alone, and the order follows from it.
        asked = split.samples if only.key == "data_path" else samples_asked(1.0, split.samples, split.samples)
        return replace(split, sources=(replace(only, asked=asked, drawn=split.samples),))
    order = blend_order([source.weight for source in split.sources], split.samples)
    sources = []
    for number, source in enumerate(split.sources):
        drawn = int((order[0] == number).sum())
        sources.append(replace(source, asked=samples_asked(source.weight, split.samples, drawn), drawn=drawn))
    return replace(split, sources=tuple(sources), order=order)
