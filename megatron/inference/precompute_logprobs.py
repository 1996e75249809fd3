"""The log-probability that a model gives each token of a data set, as a data set of the same shape.

For every item of `<path>` the file `<path>_<model name>.bin/.idx` holds as many float32 numbers: the first is 0, since
nothing is before the first token, and number i is the log-probability [nats] of token i after the tokens before it.
An item longer than the model's context is scored in windows that overlap: after the first, each scores `eval_overlap`
tokens, with the tokens before them that fit. A data set whose .idx is there already is left alone, so
that an interrupted run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch

from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import DatasetWriter
from megatron.engine.engine import Engine
from megatron.errors import RunError
from megatron.inference.scoring import Pair, token_scores, windows
from megatron.log import get_logger


def write_log_probabilities(
    engine: Engine,
    path: str,
    target: str,
    *,
    max_length: int,
    batch_size: int,
    overlap: int,
    writes: bool,
    vocabulary: int | None = None,
) -> None:
    """Scores every item of the data set at `path`. Collective over the model's ranks; one of them writes.

    Raises RunError where the model's scores are not numbers.

    Args:
        engine: The model.
        path: Prefix of the dataset.
        target: Prefix of the output.
        max_length: Context of the model [tokens].
        batch_size: Sequences in one forward pass.
        overlap: Tokens that each window after the first scores [tokens].
        writes: True on the rank that writes.
        vocabulary: The ids that exist [tokens].
    """
    if Path(f"{target}.idx").is_file():
        get_logger(__name__).info("%s.idx is there already", target)
        return
    source = IndexedDataset(path)
    writer = DatasetWriter(target, numpy.dtype(numpy.float32)) if writes else None
    if writer is not None:
        writer.__enter__()
    try:
        for start in range(0, len(source), batch_size):
            items = [numpy.asarray(source[at]) for at in range(start, min(start + batch_size, len(source)))]
            found = item_scores(
                engine, items, max_length=max_length, batch_size=batch_size, overlap=overlap, vocabulary=vocabulary
            )
            for at, scores in enumerate(found, start):
                _require_numbers(scores, f"{path}, item {at}")
                if writer is not None:
                    writer.add_document(scores)
    except BaseException as error:
        if writer is not None:
            writer.__exit__(type(error), error, error.__traceback__)
        raise
    if writer is not None:
        writer.__exit__(None, None, None)
        get_logger(__name__).info("%d items written to %s", len(source), target)


def _require_numbers(scores: numpy.ndarray, location: str) -> None:
    if not numpy.isfinite(scores).all():
        raise RunError.of(
            "the model's scores are not numbers (NaN or infinite)",
            location=location,
            hint="look for such values in the checkpoint, or for an overflow in its precision",
        )


def item_scores(
    engine: Engine,
    items: Sequence[numpy.ndarray],
    *,
    max_length: int,
    batch_size: int,
    overlap: int,
    vocabulary: int | None = None,
) -> list[numpy.ndarray]:
    """The log-probabilities of each item's tokens, float32 of the item's length.

    Args:
        engine: Computes logits.
        items: Ids of each item.
        max_length: Context length [tokens].
        batch_size: Items in one forward pass.
        overlap: Tokens that each window after the first scores [tokens].
        vocabulary: Number of ids that exist; all unless given.
    """
    pairs: list[Pair] = []
    owners: list[int] = []
    for number, item in enumerate(items):
        tokens = item.tolist()
        stride = min(overlap, max_length)
        for pair in windows(tokens[:1], tokens[1:], max_length, stride) if len(tokens) > 1 else ():
            pairs.append(pair)
            owners.append(number)
    parts: list[list[torch.Tensor]] = [[] for _ in items]
    for owner, found in zip(
        owners, token_scores(engine, pairs, batch_size=batch_size, vocabulary=vocabulary), strict=True
    ):
        parts[owner].append(found)
    return [
        numpy.concatenate([numpy.zeros(min(1, len(item)), numpy.float32), *(part.numpy() for part in some)]).astype(
            numpy.float32
        )
        for item, some in zip(items, parts, strict=True)
    ]
