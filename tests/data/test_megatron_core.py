"""Megatron-Core, from the package index, reads what is written here, and the other way round; its compiled helpers give
the same sample index and blend.

Its package is called `megatron` as ours is, so it lives in a folder of its own and runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.data.dataset.blend import blend_order
from megatron.data.dataset.index_map import build_index_map, epochs_needed
from megatron.data.indexed.reader import IndexedDataset, dtype_for_vocabulary
from megatron.data.indexed.writer import DatasetWriter
from tests.packages import installed

pytestmark = pytest.mark.registry

SCRIPT = Path(__file__).with_name("megatron_core_side.py")


@pytest.fixture(scope="module")
def megatron_core():
    """The folder that holds the package; fetched once."""
    return installed("megatron-core", "megatron-core")


@pytest.fixture
def run(megatron_core, tmp_path):
    def command(name):
        environment = os.environ | {"PYTHONPATH": str(megatron_core), "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT), name, str(tmp_path)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return command


def documents(vocabulary):
    generator = np.random.default_rng(5)
    return [generator.integers(0, vocabulary, size) for size in (1, 700, 3, 0, 64, 12345)]


@pytest.mark.parametrize("vocabulary", [512, 50_257, 65_499, 100_000])
def test_they_read_ours(run, tmp_path, vocabulary):
    made = documents(vocabulary)
    with DatasetWriter(tmp_path / "ours", dtype_for_vocabulary(vocabulary)) as writer:
        for document in made:
            writer.add_document(document)
    run("read")
    found = np.load(tmp_path / "read.npz")
    assert found["lengths"].tolist() == [len(document) for document in made]
    assert found["document_indices"].tolist() == list(range(len(made) + 1))
    assert str(found["dtype"]) == dtype_for_vocabulary(vocabulary).name
    for item, document in enumerate(made):
        np.testing.assert_array_equal(found[f"d{item}"], document)


@pytest.mark.parametrize("vocabulary", [512, 100_000])
def test_we_read_theirs_and_write_the_same_bytes(run, tmp_path, vocabulary):
    made = documents(vocabulary)
    np.savez(tmp_path / "documents.npz", vocabulary=vocabulary, **{f"d{item}": each for item, each in enumerate(made)})
    run("write")
    theirs = IndexedDataset(tmp_path / "theirs")
    theirs.check()
    assert len(theirs) == len(made)
    for item, document in enumerate(made):
        np.testing.assert_array_equal(theirs[item], document)
    with DatasetWriter(tmp_path / "ours", dtype_for_vocabulary(vocabulary)) as writer:
        for document in made:
            writer.add_document(document)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize(("seq_length", "expected"), [(16, 100), (128, 3000), (1000, 7)])
def test_sample_index_and_blend_equal_their_compiled_helpers(run, tmp_path, seq_length, expected):
    sizes = np.random.default_rng(seq_length).integers(1, 400, 500).astype(np.int32)
    total = int(sizes.sum())
    epochs = epochs_needed(total, seq_length, expected)
    ours = build_index_map(sizes, range(500), seq_length=seq_length, epochs=epochs, seed=99)
    weights = np.random.default_rng(expected).dirichlet(np.ones(5))
    np.savez(
        tmp_path / "index_input.npz",
        sizes=sizes,
        documents=ours.documents,
        seq_length=seq_length,
        epochs=epochs,
        tokens_per_epoch=total,
        weights=weights,
        blend_samples=expected,
    )
    run("index")
    theirs = np.load(tmp_path / "index_output.npz")
    np.testing.assert_array_equal(ours.samples, theirs["samples"])
    sets, numbers = blend_order(weights.tolist(), expected)
    np.testing.assert_array_equal(sets, theirs["sets"])
    np.testing.assert_array_equal(numbers, theirs["numbers"])
