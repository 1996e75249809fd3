"""Search by faiss, on the CPU: an index of all embeddings of a corpus, or one of cells.

`flat` compares a question with all embeddings. `ivf` has cells around centroids of k-means (arXiv:1702.08734) and
compares a question with the embeddings of the nearest cells; `ivf.faiss` beside the embeddings is that index, and
`ivf.json` says what it was built from. Embeddings are stored as they are, so scores are those of the exact search.

Shapes: q questions, n passages, d width of an embedding, k results.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.atomic import atomic_path
from megatron.config.derived.retrieval import EXACT, FLAT, IVF
from megatron.errors import ConfigError, RunError
from megatron.log import get_logger
from megatron.retrieval import embedding_file
from megatron.retrieval.search import best

KEY = "retrieval_index"
INDEX, METADATA = "ivf.faiss", "ivf.json"
ROWS = 65_536
"""Embeddings that are added at once."""
LEARNED, LEAST = 64, 39
"""Embeddings of a cell that its centroid is learned from at most, and at least, as faiss recommends."""


def require_faiss(index: str) -> None:
    """Raises ConfigError where an index needs faiss, which is not installed."""
    if index != EXACT and find_spec("faiss") is None:
        hint = "pip install 'neox[faiss]', or set it to exact"
        raise ConfigError.of("it needs the package faiss-cpu, which is not installed", key=KEY, value=index, hint=hint)


def cell_count(passages: int) -> int:
    """Returns how many cells an index of that many embeddings has: 4 sqrt(n), fewer where few would be in each."""
    return max(1, min(round(4 * math.sqrt(passages)), passages // LEAST))


class FaissIndex:
    """An index that finds the embeddings with the largest products, or the smallest Euclidean distances."""

    def __init__(self, index: Any, probes: int | None = None) -> None:
        """Takes an index of faiss, and the cells that it compares with."""
        self._index, self._probes = index, probes

    @classmethod
    def flat(cls, vectors: np.ndarray, *, distances: bool = False) -> FaissIndex:
        """Returns an index of embeddings [n, d] that compares a question with all.

        distances: by Euclidean distance instead of the product.
        """
        import faiss

        width, metric = vectors.shape[1], _metric(distances)
        if vectors.dtype == np.float16:
            index: Any = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, metric)
        else:
            index = faiss.IndexFlat(width, metric)
        _add(index, vectors)
        return cls(index)

    @classmethod
    def ivf(cls, folder: Path, vectors: np.ndarray, probes: int, *, distances: bool = False) -> FaissIndex:
        """Returns the index of cells of a folder of embeddings, which is built where there is none.

        Args:
            folder: of the embeddings.
            vectors: the embeddings [n, d].
            probes: cells that a question is compared with.
            distances: by Euclidean distance instead of the product.

        Raises ConfigError where the folder has one that was built from other embeddings, RunError where it cannot be
        read, and OSError where it cannot be written.
        """
        import faiss

        cells = cell_count(len(vectors))
        metadata = {"embeddings": embedding_file.header(folder), "cells": cells}
        if (folder / METADATA).exists():
            _require_same(folder, metadata)
            try:
                index: Any = faiss.read_index(str(folder / INDEX))
            except RuntimeError as error:
                raise _unreadable(folder, str(error)) from None
            if (index.ntotal, index.d) != vectors.shape:
                raise _unreadable(folder, f"it has {index.ntotal} embeddings of width {index.d}")
        else:
            index = _build(vectors, cells, distances)
            _write(folder, index, metadata)
        return cls(index, min(probes, cells))

    def nearest(self, questions: Tensor, count: int, left_out: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Returns scores and numbers of the best embeddings, the best first: [q, k] and [q, k].

        A score is a product, or a squared distance, negated. Where the cells have fewer than k the rest has the number
        -1 and the score -inf.

        Args:
            questions: embeddings in fp32 [q, d].
            count: k; at most n are found.
            left_out: numbers of embeddings that are not found.
        """
        import faiss

        kind = faiss.SearchParameters if self._probes is None else faiss.SearchParametersIVF
        settings: dict[str, Any] = {} if self._probes is None else {"nprobe": self._probes}
        if left_out is not None:
            settings["sel"] = faiss.IDSelectorNot(faiss.IDSelectorBatch(left_out.astype(np.int64)))
        asked = np.ascontiguousarray(questions.cpu().numpy())
        found = self._index.search(asked, min(count, self._index.ntotal), params=kind(**settings))
        scores, numbers = map(torch.from_numpy, found)
        scores = -scores if self._index.metric_type == faiss.METRIC_L2 else scores
        return best(scores.masked_fill(numbers < 0, -math.inf), numbers, count)


def open_index(
    kind: str, folder: Path, vectors: np.ndarray, probes: int, *, distances: bool = False
) -> FaissIndex | None:
    """Returns the index of a folder of embeddings as `retrieval_index` says, None for the exact search.

    Args:
        kind: `retrieval_index`.
        folder: of the embeddings.
        vectors: the embeddings [n, d].
        probes: cells that a question is compared with, of those of `ivf`.
        distances: by Euclidean distance instead of the product.

    Raises what FaissIndex.ivf raises.
    """
    if kind == IVF:
        return FaissIndex.ivf(folder, vectors, probes, distances=distances)
    return FaissIndex.flat(vectors, distances=distances) if kind == FLAT else None


def _metric(distances: bool) -> Any:
    import faiss

    return faiss.METRIC_L2 if distances else faiss.METRIC_INNER_PRODUCT


def _build(vectors: np.ndarray, cells: int, distances: bool) -> Any:
    """An index of cells with all embeddings. Centroids are learned from a random share of them, always the same."""
    import faiss

    width, metric = vectors.shape[1], _metric(distances)
    centroids = faiss.IndexFlat(width, metric)
    if vectors.dtype == np.float16:
        half = faiss.ScalarQuantizer.QT_fp16
        index: Any = faiss.IndexIVFScalarQuantizer(centroids, width, cells, half, metric, False)
    else:
        index = faiss.IndexIVFFlat(centroids, width, cells, metric)
    get_logger(__name__).info("builds an index of %d cells for %d embeddings", cells, len(vectors))
    count = min(len(vectors), LEARNED * cells)
    chosen = np.sort(np.random.default_rng(0).choice(len(vectors), count, replace=False))
    learned = np.asarray(vectors[chosen], np.float32)
    index.train(learned[np.isfinite(learned).all(1)])
    _add(index, vectors)
    return index


def _add(index: Any, vectors: np.ndarray) -> None:
    for start in range(0, len(vectors), ROWS):
        index.add(np.array(vectors[start : start + ROWS], np.float32))


def _write(folder: Path, index: Any, metadata: dict[str, Any]) -> None:
    import faiss

    with atomic_path(folder / INDEX) as temporary:
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:
            raise RunError.of(f"the index cannot be written: {error}", key=KEY, location=str(folder)) from None
    with atomic_path(folder / METADATA) as temporary:
        temporary.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _require_same(folder: Path, metadata: dict[str, Any]) -> None:
    """Raises ConfigError that names what the index of a folder was built from otherwise."""
    try:
        found = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        before, now = found["embeddings"], metadata["embeddings"]
        other = [name for name, value in now.items() if before.get(name) != value]
        other += ["cells"] if found["cells"] != metadata["cells"] else []
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _unreadable(folder, str(error)) from None
    if other:
        what = f"{folder / INDEX} was built from other embeddings, of which these differ: {', '.join(other)}"
        raise ConfigError.of(what, key=KEY, value=IVF, hint=f"remove {METADATA}, and the next search builds it again")


def _unreadable(folder: Path, why: str) -> RunError:
    hint = f"remove {METADATA}, and the next search builds it again"
    return RunError.of(f"the index cannot be read: {why}", key=KEY, location=str(folder / INDEX), hint=hint)
