"""What decides which sample is number k of a run, as plain facts that a checkpoint keeps and a resume compares."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from megatron.config.schema.data import DataSection
from megatron.data.dataset.index_cache import PACKED
from megatron.data.dataset.summary import SplitPlan
from megatron.data.indexed.reader import IndexedDataset

_SAMPLED = 1 << 14  # tokens at each of three places


def token_digest(dataset: IndexedDataset) -> str:
    """A fingerprint of a token file, cheap for any size: SHA-256 of its first, middle and last 16,384 tokens."""
    tokens = dataset.tokens
    found = hashlib.sha256()
    for start in (0, max(0, len(tokens) // 2 - _SAMPLED // 2), max(0, len(tokens) - _SAMPLED)):
        found.update(tokens[start : start + _SAMPLED].tobytes())
    return found.hexdigest()[:16]


def order_facts(
    data: DataSection,
    train: SplitPlan,
    *,
    seed: int,
    train_epochs: int | None,
    masked: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The facts: JSON values by the name of the key that decides them.

    Of each data set its documents and tokens in the training split, its fingerprint and its weight; and the passes that
    the shuffle of `packed` samples spans, since documents of all passes are shuffled together: another number of them
    is another order from the first sample on.

    Args:
        data: Data sets and their splits.
        train: Plan of the training split.
        seed: Seed of the shuffle.
        train_epochs: Epochs of the run; None if it counts steps.
        masked: Settings of masked samples; None for a language model.
    """
    packed = data.pack_impl == PACKED
    several = len(train.sources) > 1
    facts: dict[str, Any] = {
        "seed": seed,
        "seq_length": train.seq_length,
        "pack_impl": data.pack_impl,
        "data_path": [[source.documents, source.tokens, source.digest] for source in train.sources],
        "train_epochs": train_epochs,
    }
    if masked is not None:
        facts |= masked
    elif not packed:
        facts["allow_chopped"] = data.allow_chopped
        # Of labels follow the documents that have something to learn, which are shuffled.
        facts["train_label_data_paths"] = [
            source.unpacked.documents if source.unpacked else 0 for source in train.sources
        ]
    if packed or masked is not None:
        facts["passes"] = [source.epochs for source in train.sources]
    if several:
        facts["train_data_weights"] = [source.weight for source in train.sources]
    return facts
