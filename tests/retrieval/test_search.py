"""Exact search against numpy, and the file of embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.distributed.mesh import Axis
from megatron.errors import ConfigError, RunError
from megatron.retrieval import embedding_file, search
from megatron.retrieval.embedding_file import EmbeddingFile
from megatron.retrieval.neighbors import nearest_elsewhere
from megatron.retrieval.search import nearest

FACTS: dict[str, Any] = {"passages": 10, "width": 3, "dtype": "float16", "corpus": "c", "tokenizer": "t"}


@pytest.mark.parametrize(("passages", "count"), [(50, 7), (50, 50), (5, 9), (8, 1)])
def test_the_nearest_are_those_of_numpy(passages: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers, so that products are exact and many are equal."""
    monkeypatch.setattr(search, "ROWS", 8)
    monkeypatch.setattr(search, "QUESTIONS", 2)
    generator = np.random.default_rng(passages)
    vectors = generator.integers(-3, 4, (passages, 6)).astype(np.float16)
    questions = generator.integers(-3, 4, (5, 6)).astype(np.float32)
    scores, numbers = nearest(torch.from_numpy(questions), vectors, count, Axis("data"))
    products = questions.astype(np.float64) @ vectors.astype(np.float64).T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(numbers.numpy(), expected)
    np.testing.assert_array_equal(scores.numpy(), np.take_along_axis(products, expected, 1))


def test_of_equal_chunks_the_first_are_neighbors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of left-out documents, and one that is not a number, are no neighbours."""
    monkeypatch.setattr(search, "ROWS", 7)
    monkeypatch.setattr(search, "QUESTIONS", 2)
    generator = np.random.default_rng(0)
    vectors = generator.integers(-1, 2, (40, 3)).astype(np.float32)
    vectors[5] = np.nan
    questions, owners = generator.integers(-1, 2, (6, 3)).astype(np.float32), np.arange(40) // 4
    left_out = [np.array([0, 3]), np.array([9]), np.array([], np.int64)]
    found = nearest_elsewhere(torch.from_numpy(questions), vectors, owners, left_out, 6)
    distances = np.square(questions[:, None] - vectors).sum(-1)
    distances[:, 5] = np.inf
    for number, row in enumerate(distances):
        row[np.isin(owners, left_out[number // 2])] = np.inf
    np.testing.assert_array_equal(found, np.argsort(distances, axis=1, kind="stable")[:, :6])


def test_what_is_missing_is_known_and_other_embeddings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_file, "BLOCK", 4)
    folder = tmp_path / "new" / "folder"
    with pytest.raises(RunError, match="there are no embeddings"):
        EmbeddingFile(folder, writes=False)
    embedding_file.create(folder, FACTS)
    stored = EmbeddingFile(folder, writes=True)
    with pytest.raises(ConfigError, match="3 blocks of its embeddings are missing"):
        stored.require_complete(folder, key="embedding_path", hint="embed them")
    assert stored.missing == [0, 1, 2] and stored.numbers(2) == range(8, 10)
    stored.write(2, np.full((2, 3), 1.5))
    embedding_file.create(folder, FACTS)  # nothing written is lost
    again = EmbeddingFile(folder, writes=False)
    assert again.missing == [0, 1] and again.rows[8:].tolist() == [[1.5] * 3] * 2
    for name, value in (("corpus", "other"), ("tokenizer", "u"), ("passages", 11)):
        with pytest.raises(ConfigError, match=f"made otherwise: {name}: "):
            embedding_file.create(folder, {**FACTS, name: value})
    np.save(folder / "vectors.npy", np.zeros((9, 3), np.float16))
    with pytest.raises(RunError, match="has the shape"):
        EmbeddingFile(folder, writes=False)
    (folder / "index.json").write_text(json.dumps({**FACTS, "version": 2}))
    with pytest.raises(RunError, match="version 2"):
        EmbeddingFile(folder, writes=False)
