"""Rows of the embedding: those of the checkpoint to load, or those that the tokenizer needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from megatron.adapter_config import low_rank, soft_prompt
from megatron.checkpoint.format.weight_shards import StoredWeights, WeightFiles
from megatron.checkpoint.huggingface.encoder_pair import is_folder, open_folder
from megatron.checkpoint.load import find
from megatron.checkpoint.load.adapter_base import declared_tokens, frozen_rows, tokens_of
from megatron.config import Config
from megatron.config.derived.vocabulary import padded_vocab_size
from megatron.config.schema.model import ModelSection
from megatron.errors import RunError
from megatron.log import get_logger

_log = get_logger(__name__)

MOST_PADDING = 1024
"""Rows of an embedding beyond the tokenizer's: more of them are another vocabulary (the public default pads to
128 times the tensor-parallel degree)."""


class StoredEmbedding(NamedTuple):
    """The stored word embedding. rows: of all tensor-parallel ranks, padding included [tokens]."""

    rows: int
    dtype: torch.dtype

    @staticmethod
    def of(weights: StoredWeights) -> StoredEmbedding:
        shards = weights.shards("0.word_embeddings.weight")
        return StoredEmbedding(sum(shard.shape[0] for shard in shards), shards[0].dtype)


class StoredVocabulary(NamedTuple):
    """Sizes of a stored vocabulary [tokens]."""

    rows: int
    """Rows of the embedding, padding included."""
    tokens: int
    """Rows that are tokens."""
    declared: int | None = None
    """Tokens by the model's own word, whatever its tokenizer has."""


@dataclass(frozen=True)
class Rows:
    """Size of the vocabulary of a model."""

    rows: int
    """Rows of the embedding, padding included [tokens]."""
    known: int
    """Ids from here on are unknown to the model [tokens]."""


def vocabulary_rows(config: Config, padded: int, *, tokens: int, model_size: int, may_grow: bool = False) -> Rows:
    """Rows of the embedding: those of the checkpoint to load, where it has the same vocabulary, else `padded`.

    Padding depends on the tensor-parallel degree, and a model must not change with it. Rows that the degree does not
    divide are padded further.

    Args:
        config: The run's configuration.
        padded: Rows that the tokenizer alone would need.
        tokens: Of the tokenizer; the key vocab_size says what else a model may have rows for, as one that was taken
            over from a folder of another program says it.
        model_size: Tensor-parallel degree.
        may_grow: Whether tokens beyond the checkpoint's rows get rows of their own; otherwise the model knows nothing
            of them.
    """
    found = _stored(config)
    if found is None:
        return Rows(padded, tokens)
    stored = found.rows
    if may_grow:
        _warn_of_frozen_rows(config.model, tokens - found.tokens)
    if tokens > stored:
        if may_grow:
            _log.info(
                "the embedding grows from %d to %d rows; the new ones start as the mean of the others", stored, padded
            )
            return Rows(padded, tokens)
        message = "the tokenizer has %d tokens and the checkpoint rows for %d; a text or data with another is refused"
        _log.warning(message, tokens, stored)
        return Rows(padded_vocab_size(stored, 1, model_size), stored)
    for size in (tokens, config.tokenizer.vocab_size, found.declared):
        if size is not None and size <= stored < size + max(MOST_PADDING, padded - tokens + 1):
            return Rows(padded_vocab_size(stored, 1, model_size), tokens)
    return Rows(padded, tokens)


def existing_ids(config: Config, known: int, rows: int | None = None) -> int:
    """How many ids exist [tokens]: a model that was trained elsewhere may have more than its tokenizer.

    The key vocab_size and the checkpoint to load say so; more than the embedding has rows for count for nothing.

    Args:
        config: The run's configuration.
        known: Of the tokenizer, as far as the model knows them.
        rows: Rows of the embedding, padding included; those of the checkpoint unless set.
    """
    found = _stored(config)
    most = rows if rows is not None else found.rows if found is not None else known
    sizes = (config.tokenizer.vocab_size, None if found is None else found.declared)
    return max(known, *(size for size in sizes if size is not None and size <= most), 0)


def _warn_of_frozen_rows(model: ModelSection, added: int) -> None:
    """A line where tokens are new to the checkpoint's model, and nothing trains their rows. added: [tokens]."""
    adapter = low_rank(model.lora)
    if added <= 0 or (adapter is None and soft_prompt(model.soft_prompt_tuning) is None):
        return
    tied = not model.no_weight_tying
    frozen = frozen_rows(frozenset() if adapter is None else adapter.trained(tied=tied), tied=tied)
    if frozen:
        message = (
            "the %d new rows of the %s are frozen and stay equal, so the model cannot tell these tokens apart; %s, or "
            "train all weights"
        )
        hint = "write modules_to_save: [embedding, head] in lora"
        hint = hint if adapter is not None else f"train lora instead of a soft prompt, and {hint}"
        _log.warning(message, added, " and the ".join(frozen), hint)


def _stored(config: Config) -> StoredVocabulary | None:
    """The vocabulary of the checkpoint that `load` names, or an older one of that run; None if there is none."""
    if config.checkpoint.load is None:
        return None
    root = Path(config.checkpoint.load)
    if is_folder(root):
        rows = open_folder(root).rows
        return StoredVocabulary(rows, rows, rows)
    for directory in find.candidates(root, config.checkpoint.iteration):
        try:
            rows = StoredEmbedding.of(WeightFiles.open(directory)).rows
            return StoredVocabulary(rows, tokens_of(directory, rows), declared_tokens(directory, rows))
        except (RunError, OSError, KeyError):
            continue  # it is damaged, which is reported when it is read
    return None
