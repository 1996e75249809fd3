"""Index maps against a slow walk over the tokens, written from the description of the format alone."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.dataset.index_map import build_index_map, epochs_needed, samples_in


def walked(sizes, documents, seq_length, required, seed):
    """The public arrays, one token at a time: lists of Python integers, and only numpy's shuffle from outside."""
    tokens_per_epoch = sum(int(sizes[document]) for document in documents)
    epochs = 1
    while (epochs * tokens_per_epoch - 1) // seq_length < required:
        epochs += 1
    generator = np.random.RandomState(seed)
    order = np.array([document for _ in range(epochs) for document in documents], dtype=np.int32)
    generator.shuffle(order)
    starts, token = [], 0
    for position, document in enumerate(order):
        for offset in range(int(sizes[document])):
            if token % seq_length == 0:
                starts.append((position, offset))
            token += 1
    # Start i opens sample i and closes sample i - 1; the last token of the last sample is one that a start names.
    count = (epochs * tokens_per_epoch - 1) // seq_length
    shuffle = np.arange(count, dtype=np.uint32)
    generator.shuffle(shuffle)
    return order, starts[: count + 1], shuffle, epochs


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    first=st.integers(0, 5),
    seq_length=st.integers(1, 50),
    required=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_walk(sizes, first, seq_length, required, seed):
    sizes = np.array([7] * first + sizes, dtype=np.int32)
    documents = range(first, len(sizes))
    order, starts, shuffle, epochs = walked(sizes, documents, seq_length, required, seed)
    total = int(sizes[first:].sum())
    assert epochs_needed(total, seq_length, required) == epochs
    made = build_index_map(sizes, documents, seq_length=seq_length, epochs=epochs, seed=seed)
    assert made.epochs == epochs
    np.testing.assert_array_equal(made.documents, order)
    np.testing.assert_array_equal(made.samples, starts)
    np.testing.assert_array_equal(made.shuffle, shuffle)
    assert len(made) == samples_in(total, seq_length, epochs) >= required


def test_types_are_the_public_ones():
    made = build_index_map(np.array([5, 9], np.int32), range(2), seq_length=4, epochs=3, seed=1)
    assert (made.documents.dtype, made.samples.dtype, made.shuffle.dtype) == (np.int32, np.int32, np.uint32)


def test_values_do_not_move():
    """Golden: another numpy, or another order of drawing, would change every run's data."""
    sizes = np.array([3, 1, 4, 1, 5, 9, 2, 6], np.int32)
    made = build_index_map(sizes, range(8), seq_length=4, epochs=2, seed=1234)
    assert made.documents.tolist() == [5, 3, 0, 4, 6, 2, 2, 7, 1, 1, 0, 4, 5, 6, 3, 7]
    digest = hashlib.sha256(made.samples.tobytes() + made.shuffle.tobytes()).hexdigest()
    assert digest == "1abdbc5ad5cd20b8e357a2c4936299d2033d55280198af5533598a9f6480dbd1"


def test_int64_offsets_inside_a_file_of_many_tokens():
    """Token positions beyond 2^31 are computed in 64 bits."""
    sizes = np.array([2_000_000_000, 2_000_000_000, 10], np.int32)
    made = build_index_map(sizes, range(3), seq_length=1_000_000_000, epochs=1, seed=0)
    row = [(int(made.documents[position]), int(offset)) for position, offset in made.samples]
    assert len(made) == 4
    ends = np.cumsum(sizes[made.documents].astype(np.int64))
    for sample, (position, offset) in enumerate(made.samples.tolist()):
        start = 0 if position == 0 else int(ends[position - 1])
        assert start + offset == sample * 1_000_000_000, row


@pytest.mark.parametrize(
    ("tokens", "seq_length", "samples", "epochs"), [(100, 10, 9, 1), (100, 10, 10, 2), (5, 10, 1, 3)]
)
def test_epochs(tokens, seq_length, samples, epochs):
    assert epochs_needed(tokens, seq_length, samples) == epochs
