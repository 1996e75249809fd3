"""From the data section of a configuration to loaders: open files, cut splits, prepare index maps, say what comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron.config.schema.data import DataSection
from megatron.data.dataset.blend import BlendedDataset, full_passes
from megatron.data.dataset.data_order import token_digest
from megatron.data.dataset.gpt_dataset import PackedDataset, Samples, UnpackedDataset
from megatron.data.dataset.index_cache import PACKED, IndexRequest, MapRequest, index_maps
from megatron.data.dataset.index_map import IndexMap, epochs_needed
from megatron.data.dataset.loader import BatchLoader
from megatron.data.dataset.masked_builder import MaskedSamples
from megatron.data.dataset.sampler import BatchSampler
from megatron.data.dataset.sources import EACH_VALID, DataSource, Split, read_splits
from megatron.data.dataset.splits import NAMES
from megatron.data.dataset.summary import DataPlan, SourcePlan, SplitPlan, UnpackedSummary
from megatron.data.indexed.metadata import read_card
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.sentences import SentenceDataset
from megatron.data.indexed.tokenizer_check import check_tokenizer
from megatron.data.retro.loader import RetroData
from megatron.tokenizer_info import TokenizerInfo


@dataclass(frozen=True)
class Data:
    """The loaders of a run, None where no samples were asked for or the split is empty, and what they will serve."""

    train: BatchLoader | None
    """Loader of the training split."""
    valid: BatchLoader | None
    """Loader of the validation split."""
    test: BatchLoader | None
    """Loader of the test split."""
    plan: DataPlan
    """Summary of the data."""
    valid_sets: Mapping[str, BatchLoader] = field(default_factory=dict)
    """Of each validation set by its name, where each is to have a loss of its own."""


def build_data(
    data: DataSection,
    *,
    eod: int,
    seq_length: int,
    seed: int,
    micro_batch: int,
    data_rank: int,
    data_size: int,
    train_samples: int,
    valid_samples: int,
    test_samples: int,
    is_builder: bool,
    barrier: Callable[[], None],
    train_epochs: int | None = None,
    prompt: int = 0,
    tokenizer: TokenizerInfo | None = None,
    ids: int | None = None,
    mark_padding: bool = False,
    masked: MaskedSamples | None = None,
    retro: RetroData | None = None,
) -> Data:
    """The loaders of one data-parallel rank; every rank must call this, since it waits at the barrier.

    Raises ConfigError when no data is named, files are missing, a needed split is empty or another tokenizer made the
    data; RunError when a file is damaged.

    Args:
        data: The data section of the configuration.
        eod: The id that ends a document.
        seq_length: Length of a sequence [tokens].
        seed: Seed of the sample order.
        micro_batch: Samples of one rank in one forward pass.
        data_rank: Data-parallel rank.
        data_size: Data-parallel degree.
        train_samples: Training samples of all ranks together over the run.
        valid_samples: Validation samples of all ranks together.
        test_samples: Test samples of all ranks together.
        is_builder: Whether this rank writes the index maps, one rank for each file system.
        barrier: Returns when every rank has called it.
        train_epochs: Passes that the training data is laid out for; train_samples are at most those of epoch_samples.
        prompt: Places before each each sequence of seq_length tokens for the vectors of a learned prompt.
        tokenizer: Of the run; data that is known to come from another is refused.
        ids: Those from here on are refused where they are read; None stands for the tokenizer's.
        mark_padding: Batches say which tokens are padding, where samples are padded.
        masked: How samples of masked tokens or spans are made; None for a language model.
        retro: Where neighbours of the samples are; None without them.
    """
    started = time.monotonic()
    num_samples = dict(zip(NAMES, (train_samples, valid_samples, test_samples), strict=True))
    splits, warnings = read_splits(data, num_samples, train_epochs=train_epochs, kind=_kind(masked))
    if tokenizer is not None:
        check_tokenizer(splits, tokenizer)
    requests = _requests(splits, data, seq_length, seed, masked)
    maps, cache_warnings = _maps(requests, is_builder=is_builder, barrier=barrier)
    sampler = partial(BatchSampler, micro_batch=micro_batch, data_rank=data_rank, data_size=data_size)
    unpacked, loaders, plans = data.pack_impl != PACKED, dict[str, BatchLoader](), dict[str, SplitPlan]()
    for split, own in zip(splits, maps, strict=True):
        samples = _samples(split, own, seq_length, seed, unpacked=unpacked, masked=masked)
        plans[split.name] = _plan(split, own, len(samples), seq_length, unpacked=unpacked, masked=masked is not None)
        again = data.valid_same_samples and split.name not in ("train", "test")
        shared: dict[str, Any] = {"workers": data.num_workers, "pin_memory": torch.cuda.is_available(), "again": again}
        if masked is not None:
            loaders[split.name] = masked.loader(samples, sampler(len(samples)), **shared)
            continue
        build = partial(BatchLoader, eod=eod) if retro is None else partial(retro.loader, split.name)
        loaders[split.name] = build(
            samples,
            sampler(len(samples)),
            eod_mask_loss=data.eod_mask_loss,
            labels=unpacked or any(source.data.labels is not None for source in split.sources),
            rewards=any(source.data.rewards is not None for source in split.sources),
            documents=data.reset_attention_mask or data.reset_position_ids,
            padding=mark_padding and unpacked,
            prompt=prompt,
            vocab_size=tokenizer.vocab_size if ids is None and tokenizer is not None else ids,
            **shared,
        )
    _warm_up(splits if data.mmap_warmup else ())
    return _as_data(loaders, plans, time.monotonic() - started, (*warnings, *cache_warnings))


def _as_data(
    loaders: Mapping[str, BatchLoader], plans: Mapping[str, SplitPlan], seconds: float, warnings: tuple[str, ...]
) -> Data:
    """The loaders and what they will serve, by the names of their splits."""
    train, valid, test = (plans.get(name) for name in NAMES)
    plan = DataPlan(train, valid, test, seconds, warnings)
    each = {name.removeprefix(EACH_VALID): loader for name, loader in loaders.items() if name.startswith(EACH_VALID)}
    return Data(loaders.get("train"), loaders.get("valid"), loaders.get("test"), plan, each)


def epoch_samples(
    data: DataSection,
    *,
    epochs: int,
    seq_length: int,
    seed: int,
    is_builder: bool,
    barrier: Callable[[], None],
    masked: MaskedSamples | None = None,
) -> int:
    """Number of training samples in a number of epochs; collective. The errors are those of build_data.

    Args:
        data: Data sets and their splits.
        epochs: Passes over the training split.
        seq_length: Length of a sample [tokens].
        seed: Seed of the shuffle.
        is_builder: True on the rank that builds index maps.
        barrier: Waits for all ranks.
        masked: How samples of masked tokens or spans are made; None for a language model.
    """
    splits, _ = read_splits(data, {"train": 1}, train_epochs=epochs, kind=_kind(masked))
    requests = _requests(splits, data, seq_length, seed, masked)
    (maps,), _ = _maps(requests, is_builder=is_builder, barrier=barrier)
    return len(maps[0]) if len(maps) == 1 else len(full_passes([len(index) for index in maps])[0])


def index_requests(data: DataSection, split: Split, seq_length: int, seed: int) -> list[IndexRequest]:
    """The index map that each source of a split needs.

    Args:
        data: Data sets and their splits.
        split: Split with its sources.
        seq_length: Length of a sample [tokens].
        seed: Seed of the shuffle.
    """
    packed = data.pack_impl == PACKED
    requests = []
    for source in split.sources:
        epochs = split.epochs
        if packed and not epochs:
            epochs = epochs_needed(source.tokens, seq_length, source.asked or 0)
        requests.append(
            IndexRequest(
                dataset=source.dataset,
                name=source.name,
                documents=source.documents,
                seq_length=seq_length,
                samples=source.asked,
                epochs=epochs,
                seed=seed,
                packing=data.pack_impl,
                chopped=data.allow_chopped,
                labels=source.data.labels,
            )
        )
    return requests


def _kind(masked: MaskedSamples | None) -> type[IndexedDataset]:
    return IndexedDataset if masked is None else SentenceDataset


def _requests(
    splits: Sequence[Split], data: DataSection, seq_length: int, seed: int, masked: MaskedSamples | None
) -> list[list[MapRequest]]:
    """The index maps that the sources of every split need."""
    if masked is not None:
        return [masked.requests(split, seq_length, seed) for split in splits]
    return [[*index_requests(data, split, seq_length, seed)] for split in splits]


def _maps(
    requests: Sequence[Sequence[MapRequest]], *, is_builder: bool, barrier: Callable[[], None]
) -> tuple[list[list[Any]], list[str]]:
    """The index maps of every split's sources, and warnings for the user."""
    maps, warnings = index_maps([one for own in requests for one in own], is_builder=is_builder, barrier=barrier)
    remaining = iter(maps)
    return [[next(remaining) for _ in own] for own in requests], warnings


def _samples(
    split: Split,
    maps: Sequence[Any],
    seq_length: int,
    seed: int,
    *,
    unpacked: bool,
    masked: MaskedSamples | None,
) -> Samples:
    order = full_passes([len(index) for index in maps]) if split.epochs and len(maps) > 1 else split.order
    made: list[Samples]
    pairs = list(zip(split.sources, maps, strict=True))
    if masked is not None:
        made = [masked.samples(source, index, seq_length, seed) for source, index in pairs]
    else:
        kind = UnpackedDataset if unpacked else PackedDataset
        made = [kind(source.data, index, seq_length) for source, index in pairs]
    return made[0] if order is None else BlendedDataset(made, *order)


def _warm_up(splits: Sequence[Split]) -> None:
    """Fills the page cache, with each file once."""
    parts = [part for split in splits for source in split.sources for part in vars(source.data).values() if part]
    for dataset in {part.prefix: part for part in parts}.values():
        dataset.warm_up()


def _plan(
    split: Split, maps: Sequence[Any], samples: int, seq_length: int, *, unpacked: bool, masked: bool
) -> SplitPlan:
    sources = []
    together = sum(map(len, maps))
    for source, index in zip(split.sources, maps, strict=True):
        dataset = source.dataset
        card = read_card(dataset.prefix, documents=len(dataset), tokens=len(dataset.tokens))
        sources.append(
            SourcePlan(
                path=dataset.prefix,
                documents=len(source.documents),
                tokens=source.tokens,
                epochs=index.epochs,
                samples=len(index),
                samples_per_pass=len(index) / index.epochs if unpacked else source.tokens / seq_length,
                asked=len(index) if split.epochs else source.drawn,
                weight=len(index) / together if split.epochs and together else source.weight,
                bytes_per_token=card.bytes_per_token if card else None,
                digest=token_digest(dataset),
                unpacked=_summarize_unpacked(source, index, seq_length) if unpacked and not masked else None,
            )
        )
    return SplitPlan(split.name, samples, split.samples, seq_length, tuple(sources))


def _summarize_unpacked(source: DataSource, index: IndexMap, seq_length: int) -> UnpackedSummary:
    """What a pass reads of a source whose samples are whole documents."""
    sizes = source.dataset.sizes[index.documents[: len(index.documents) // index.epochs]]
    used = np.minimum(sizes, seq_length + 1)
    return UnpackedSummary(len(sizes), int(used.sum(dtype=np.int64)), int((sizes > seq_length + 1).sum()))
