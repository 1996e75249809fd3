"""Megatron-Core, from the package index, reads what is written here, and the other way round; its compiled helpers give
the same sample index and blend.

Its package is called `megatron` as ours is, so it lives in a folder of its own and runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.data.dataset.blend import blend_order
from megatron.data.dataset.block_map import build_block_map
from megatron.data.dataset.index_map import build_index_map, epochs_needed
from megatron.data.indexed.reader import IndexedDataset, dtype_for_vocabulary
from megatron.data.indexed.sentences import SentenceDataset
from megatron.data.indexed.writer import DatasetWriter
from tests.data import test_masked_samples as masked
from tests.data import test_span_samples as spans
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


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("length", [32, 128])
def test_masked_samples_are_theirs_number_by_number(run, tmp_path, order, length):
    """Rows of `build_mapping` and items of `BERTMaskedWordPieceDataset`, of every sample (compared with 0.16.1).

    Theirs hides a token that became the id of the padding by chance, and ours does not.
    """
    given = {
        "seq_length": length,
        "sentence_order": order,
        "seed": masked.SEED,
        "samples": 150,
        "ids": masked.VOCABULARY,
    }
    given |= {"first_piece": masked.FIRST_PIECE, "cls": masked.CLS, "sep": masked.SEP, "mask": masked.MASK}
    (tmp_path / "given.json").write_text(json.dumps(given))
    prefix = masked.write(tmp_path / "masked", masked.documents(least=2))
    run("masked")
    theirs = np.load(tmp_path / "masked_output.npz")
    samples, index = masked.pairs(prefix, length, order)
    np.testing.assert_array_equal(index.rows, theirs["rows"])
    for number in range(len(samples)):
        found = masked.Row.read(samples, number)
        counted = found.extras.labels >= 0
        np.testing.assert_array_equal(found.tokens, theirs["text"][number])
        np.testing.assert_array_equal(counted, theirs["loss_mask"][number] == 1)
        np.testing.assert_array_equal(found.extras.labels[counted], theirs["labels"][number][counted])
        np.testing.assert_array_equal(found.extras.token_types, theirs["types"][number])
        assert found.extras.sentence_order.tolist() == [theirs["is_random"][number]]
        by_chance = (found.tokens == masked.PAD) & ~found.extras.padding
        np.testing.assert_array_equal(~found.extras.padding & ~by_chance, theirs["padding_mask"][number] == 1)


@pytest.mark.parametrize("length", [32, 96])
def test_blocks_are_theirs_row_by_row(run, tmp_path, length):
    """Rows of `build_blocks_mapping` (compared with 0.16.1)."""
    (tmp_path / "given.json").write_text(json.dumps({"length": length, "seed": masked.SEED, "samples": 150}))
    generator = np.random.default_rng(6)
    made = masked.documents()
    titles = [[generator.integers(5, masked.VOCABULARY, generator.integers(1, 12))] for _ in made]
    data = SentenceDataset(masked.write(tmp_path / "text", made))
    named = SentenceDataset(masked.write(tmp_path / "title", titles))
    run("blocks")
    theirs = np.load(tmp_path / "blocks_output.npz")
    for least, name in ((2, "two"), (1, "one")):
        targets = length - 3 - named.sizes
        sizes = data.sentence_sizes
        found = build_block_map(data.bounds, sizes, targets, least=least, seed=masked.SEED, samples=150)
        np.testing.assert_array_equal(found.rows, theirs[name])


@pytest.mark.parametrize(("source", "target"), [(64, 32), (128, 48)])
def test_spans_are_theirs_number_by_number(run, tmp_path, source, target):
    """Rows of `build_mapping` and items of `T5MaskedWordPieceDataset`, of every sample (compared with 0.16.1).

    Theirs hides a token that is the id of the padding, and ours does not.
    """
    given = {"source": source, "target": target, "seed": masked.SEED, "samples": 150, "ids": masked.VOCABULARY}
    given |= {"first_piece": masked.FIRST_PIECE, "start": spans.START, "end": spans.END, "sentinels": spans.SENTINELS}
    (tmp_path / "given.json").write_text(json.dumps(given))
    prefix = masked.write(tmp_path / "spans", masked.documents())
    run("spans")
    theirs = np.load(tmp_path / "spans_output.npz")
    samples = spans.loader(prefix, spans.spans(source, target)).samples
    np.testing.assert_array_equal(samples._rows, theirs["rows"])
    for number in range(len(samples)):
        tokens, extras = spans.read(samples, number)
        labels = extras.labels[source:]
        counted = labels >= 0
        np.testing.assert_array_equal(tokens[:source], theirs["text_enc"][number])
        np.testing.assert_array_equal(tokens[source:], theirs["text_dec"][number])
        np.testing.assert_array_equal(counted, theirs["loss_mask"][number] == 1)
        np.testing.assert_array_equal(labels[counted], theirs["labels"][number][counted])
        by_chance = (tokens == masked.PAD) & ~extras.padding
        hidden = np.concatenate((theirs["enc_mask"][number], theirs["dec_mask"][number])) == 0
        np.testing.assert_array_equal(extras.padding | by_chance, hidden)
