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
    expected = np.sort(products, 1)[:, ::-1][:, :count]
    np.testing.assert_array_equal(scores.numpy(), expected)
    np.testing.assert_array_equal(np.take_along_axis(products, numbers.numpy(), 1), expected)
    assert all(len(set(row)) == len(row) for row in numbers.tolist())
    for values, row in zip(scores.tolist(), numbers.tolist(), strict=True):
        assert row == [number for _, number in sorted(zip([-value for value in values], row, strict=True))]


def test_what_is_missing_is_known_and_other_embeddings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_file, "BLOCK", 4)
    folder = tmp_path / "new" / "folder"
    with pytest.raises(RunError, match="there are no embeddings"):
        EmbeddingFile(folder, writes=False)
    embedding_file.create(folder, FACTS)
    stored = EmbeddingFile(folder, writes=True)
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
