"""Micro batches of queries and passages.

Queries are the first rows. Shapes: q queries, p passages, s sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron.data.dataset.batch import MicroBatch
from megatron.data.dataset.document_starts import document_starts
from megatron.tokenizer_info import ClassTokens

Ids = Sequence[int] | np.ndarray


def framed(ids: ClassTokens, text: Ids, title: Ids | None, length: int) -> list[int]:
    """Returns `[CLS] text [SEP]`, or `[CLS] title [SEP] text [SEP]`; what is too long loses its end.

    Args:
        ids: of separators.
        text: ids of the text.
        title: ids of the title, or None.
        length: most tokens.
    """
    first = [] if title is None else [*title, ids.sep, *([ids.sep] if ids.doubled else [])]
    found = [ids.cls, *first, *text, ids.sep]
    return found if len(found) <= length else [*found[: length - 1], ids.sep]


def write_row(row: np.ndarray, borders: np.ndarray, filled: Ids, pad: int) -> None:
    """Writes a sequence, and padding behind it.

    Args:
        row: gets the ids [s].
        borders: gets True where the sequence and the padding begin [s].
        filled: ids of the sequence; none for a row of padding.
        pad: id of padding.
    """
    row[: len(filled)], row[len(filled) :] = filled, pad
    borders[:] = False
    borders[[0, *([len(filled)] if len(filled) < len(row) else [])]] = True


def retrieval_batch(
    tokens: np.ndarray, borders: np.ndarray, right: np.ndarray, real: np.ndarray, *, types: bool
) -> MicroBatch:
    """Returns the micro batch of some rows.

    Args:
        tokens: ids, those of queries first [q + p, s].
        borders: True where a sequence and its padding begin [q + p, s].
        right: number of each query's passage, -1 for a query that does not count [q].
        real: whether a passage is one, and no padding [p].
        types: whether the model has embeddings of token types, which all are 0.
    """
    labels, counted = np.zeros(tokens.shape, np.int64), np.zeros(tokens.shape, np.float32)
    queries = len(right)
    labels[:queries, 0], counted[:queries, 0] = np.maximum(right, 0), right >= 0
    labels[queries:, 0] = real
    inputs = torch.from_numpy(tokens)
    return MicroBatch(
        inputs,
        torch.from_numpy(labels),
        torch.from_numpy(counted),
        document_starts=document_starts(inputs, torch.from_numpy(borders), None),
        token_types=torch.zeros_like(inputs) if types else None,
    )
