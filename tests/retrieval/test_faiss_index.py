"""Indices of faiss against numpy in float64, and the file of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.errors import ConfigError, RunError
from megatron.retrieval import embedding_file, faiss_index
from megatron.retrieval.faiss_index import FaissIndex, cell_count, open_index, require_faiss
from megatron.retrieval.neighbors import nearest_by_index, nearest_elsewhere

WIDTH, PASSAGES, COUNT = 8, 400, 10
FACTS: dict[str, Any] = {"passages": PASSAGES, "width": WIDTH, "corpus": "c", "tokenizer": "t", "probe": [0.5] * WIDTH}


def made(folder: Path, dtype: str, **facts: Any) -> tuple[np.ndarray, Tensor, np.ndarray]:
    """Embeddings, also in a folder, questions, and their products."""
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((PASSAGES, WIDTH)).astype(dtype)
    questions = generator.standard_normal((30, WIDTH)).astype(np.float32)
    embedding_file.create(folder, {**FACTS, "dtype": dtype, **facts})
    return vectors, torch.from_numpy(questions), questions.astype(np.float64) @ vectors.astype(np.float64).T


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_compares_with_all_passages_is_exact(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "ROWS", 150)
    vectors, questions, products = made(tmp_path, dtype)
    expected = np.argsort(-products, axis=1)[:, :COUNT]
    all_cells = cell_count(PASSAGES)
    assert all_cells == 10
    for index in (FaissIndex.flat(vectors), FaissIndex.ivf(tmp_path, vectors, all_cells)):
        scores, numbers = index.nearest(questions, COUNT)
        np.testing.assert_array_equal(numbers.numpy(), expected)
        np.testing.assert_allclose(scores.numpy(), np.take_along_axis(products, expected, 1), rtol=1e-5)


def test_the_nearest_cells_have_most_of_the_passages(tmp_path: Path) -> None:
    """What they find are the best passages of some cells; those of few passages find fewer than were asked for."""
    vectors, questions, products = made(tmp_path, "float32")
    expected = np.argsort(-products, axis=1)[:, :COUNT]
    shares = []
    for probes in (1, 3, 6):
        scores, numbers = (each.numpy() for each in FaissIndex.ivf(tmp_path, vectors, probes).nearest(questions, COUNT))
        np.testing.assert_allclose(scores, np.take_along_axis(products, numbers, 1), rtol=1e-5)
        shares.append((numbers[:, :, None] == expected[:, None]).any(1).mean())
    assert 0.2 < shares[0] < shares[1] < shares[2] < 1.0 and shares[2] > 0.9
    scores, numbers = FaissIndex.ivf(tmp_path, vectors, 1).nearest(questions, PASSAGES)
    found = (numbers >= 0).sum(1)
    assert (found < 150).all() and found.max() > 20
    assert torch.equal(numbers < 0, torch.isneginf(scores)) and (numbers.diff(dim=1) != 0)[:, :20].all()


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_neighbors_by_an_index_are_those_of_the_exact_search(kind: str, tmp_path: Path) -> None:
    """Of no document that is left out, also where few chunks remain; what is not a number is near nothing."""
    vectors, questions, _ = made(tmp_path, "float32")
    vectors[[3, 77]], questions[4] = np.nan, np.nan
    owners = np.sort(np.random.default_rng(1).integers(12, size=PASSAGES)) << 40
    left_out = [np.unique(owners)[:count] for count in (0, 1, 11)]
    index = open_index(kind, tmp_path, vectors, cell_count(PASSAGES), distances=True)
    assert index is not None
    for count in (COUNT, 60):
        found = nearest_by_index(index, questions, owners, left_out, count)
        np.testing.assert_array_equal(found, nearest_elsewhere(questions, vectors, owners, left_out, count))
    assert (found[:20] >= 0).sum() == 19 * 60 and (found[20:] < 0).any() and (found[20:] >= 0).any()


def test_an_index_of_other_embeddings_is_refused(tmp_path: Path) -> None:
    vectors, questions, _ = made(tmp_path / "one", "float32")
    first = FaissIndex.ivf(tmp_path / "one", vectors, 2).nearest(questions, COUNT)
    written = (tmp_path / "one" / "ivf.faiss").stat().st_mtime_ns
    again = FaissIndex.ivf(tmp_path / "one", vectors[::-1], 2).nearest(questions, COUNT)  # not built again
    assert all(map(torch.equal, first, again))
    assert (tmp_path / "one" / "ivf.faiss").stat().st_mtime_ns == written
    for name, value in (("corpus", "d"), ("tokenizer", "u"), ("probe", [0.25] * WIDTH)):
        made(tmp_path / name, "float32", **{name: value})
        for file in ("ivf.faiss", "ivf.json"):
            (tmp_path / name / file).write_bytes((tmp_path / "one" / file).read_bytes())
        with pytest.raises(ConfigError, match=f"built from other embeddings, of which these differ: {name}") as raised:
            FaissIndex.ivf(tmp_path / name, vectors, 2)
        assert "remove ivf.json" in str(raised.value)
    (tmp_path / "one" / "ivf.faiss").write_bytes((tmp_path / "one" / "ivf.faiss").read_bytes()[:900])
    with pytest.raises(RunError, match="the index cannot be read"):
        FaissIndex.ivf(tmp_path / "one", vectors, 2)
    (tmp_path / "one" / "ivf.json").write_text(json.dumps({"cells": 10}))
    with pytest.raises(RunError, match="the index cannot be read"):
        FaissIndex.ivf(tmp_path / "one", vectors, 2)


def test_without_faiss_only_the_exact_search_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    require_faiss("flat")
    monkeypatch.setattr(faiss_index, "find_spec", lambda name: None)
    require_faiss("exact")
    with pytest.raises(ConfigError, match=r"neox\[faiss\]"):
        require_faiss("ivf")
