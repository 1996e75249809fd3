"""From the data section of a configuration to loaders: open files, cut splits, prepare index maps, say what comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron.config.sections.data import DataSection
from megatron.data.blend import BlendedDataset
from megatron.data.card import read_card
from megatron.data.gpt import PackedDataset, Samples
from megatron.data.index_cache import IndexRequest, index_maps
from megatron.data.index_map import IndexMap, epochs_needed
from megatron.data.loader import Loader
from megatron.data.plan import DataPlan, SourcePlan, SplitPlan
from megatron.data.sampler import Sampler
from megatron.data.sources import Source, Split, read_splits
from megatron.data.splits import NAMES


@dataclass(frozen=True)
class Data:
    """The loaders of a run, None where no samples were asked for or the split is empty, and what they will serve."""

    train: Loader | None
    valid: Loader | None
    test: Loader | None
    plan: DataPlan


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
) -> Data:
    """The loaders of one data-parallel rank; every rank must call this, since it waits at the barrier.

    eod: the id that ends a document. seq_length: [tokens]. seed: of the sample order. micro_batch: samples of one rank
    at once. *_samples: how many all ranks together will take over the whole run. is_builder: whether this rank writes
    the index maps, one rank for each file system. barrier: returns when every rank has called it.
    Raises ConfigError when no data is named, files are missing or a needed split is empty; RunError when a file is
    damaged.
    """
    started = time.monotonic()
    wanted = dict(zip(NAMES, (train_samples, valid_samples, test_samples), strict=True))
    splits, warnings = read_splits(data, wanted)
    requests = [_request(source, seq_length, seed) for split in splits for source in split.sources]
    maps, cache_warnings = index_maps(requests, is_builder=is_builder, barrier=barrier)
    remaining = iter(maps)
    loaders: dict[str, Loader] = {}
    plans: dict[str, SplitPlan] = {}
    for split in splits:
        own = [next(remaining) for _ in split.sources]
        samples = _samples(split, own, seq_length)
        loaders[split.name] = Loader(
            samples,
            Sampler(len(samples), micro_batch, data_rank, data_size),
            eod=eod,
            eod_mask_loss=data.eod_mask_loss,
            workers=data.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        plans[split.name] = _plan(split, own, len(samples), seq_length)
    if data.mmap_warmup:
        datasets = {source.dataset.prefix: source.dataset for split in splits for source in split.sources}
        for dataset in datasets.values():
            dataset.warm_up()
    plan = DataPlan(
        train=plans.get("train"),
        valid=plans.get("valid"),
        test=plans.get("test"),
        seconds=time.monotonic() - started,
        warnings=(*warnings, *cache_warnings),
    )
    return Data(loaders.get("train"), loaders.get("valid"), loaders.get("test"), plan)


def _request(source: Source, seq_length: int, seed: int) -> IndexRequest:
    return IndexRequest(
        dataset=source.dataset,
        name=source.name,
        documents=source.documents,
        seq_length=seq_length,
        samples=source.asked,
        epochs=epochs_needed(source.tokens, seq_length, source.asked),
        seed=seed,
    )


def _samples(split: Split, maps: Sequence[IndexMap], seq_length: int) -> Samples:
    packed = [
        PackedDataset(source.dataset, index, seq_length) for source, index in zip(split.sources, maps, strict=True)
    ]
    return packed[0] if split.order is None else BlendedDataset(packed, *split.order)


def _plan(split: Split, maps: Sequence[IndexMap], samples: int, seq_length: int) -> SplitPlan:
    sources = []
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
                asked=source.drawn,
                weight=source.weight,
                bytes_per_token=card.bytes_per_token if card else None,
            )
        )
    return SplitPlan(split.name, samples, split.samples, seq_length, tuple(sources))
