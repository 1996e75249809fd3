"""The compiled loops against their twins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.dataset import blend, index_map, numba_loops


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.integers(1, 10**6), min_size=1, max_size=12), samples=st.integers(0, 3000))
def test_the_order_of_a_blend(parts, samples):
    weights = [part / sum(parts) for part in parts]
    expected = blend.greedy_order(weights, samples)
    for got, want in zip(numba_loops.greedy_order(np.array(weights), samples), expected, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_the_order_of_more_sets_than_a_byte_counts():
    weights = (made := np.random.default_rng(0).random(300)) / made.sum()
    for got, want in zip(numba_loops.greedy_order(weights, 2000), blend.greedy_order(list(weights), 2000), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any),
    seq_length=st.integers(1, 60),
    epochs=st.integers(1, 3),
    wide=st.booleans(),
)
def test_the_starts_of_samples(sizes, seq_length, epochs, wide):
    sizes = np.array(sizes, np.int32)
    order = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    np.random.default_rng(0).shuffle(order)
    count = index_map.samples_in(int(sizes.sum()), seq_length, epochs)
    made = [np.empty((count + 1, 2), np.int64 if wide else np.int32) for _ in range(2)]
    numba_loops.first_tokens(sizes, order, seq_length, made[0])
    index_map.first_tokens(sizes, order, seq_length, made[1])
    np.testing.assert_array_equal(*made)


def test_offsets_beyond_32_bits():
    sizes = np.full(3, 2**31 - 1, np.int32)
    order = np.arange(3, dtype=np.int32)
    made = [np.empty((7, 2), np.int64) for _ in range(2)]
    numba_loops.first_tokens(sizes, order, 10**9, made[0])
    index_map.first_tokens(sizes, order, 10**9, made[1])
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize(("turns", "there", "worth"), [(99, True, False), (100, True, True), (100, False, False)])
def test_only_long_work_is_compiled(turns, there, worth, monkeypatch):
    monkeypatch.setattr(numba_loops, "find_spec", lambda name: object() if there else None)
    assert numba_loops.worth_compiling(turns, 100) is worth


def test_long_work_takes_the_compiled_loops(monkeypatch):
    monkeypatch.setattr(blend, "COMPILED_FROM", 10)
    monkeypatch.setattr(index_map, "COMPILED_FROM", 2)
    for module, name in ((blend, "greedy_order"), (index_map, "first_tokens")):
        monkeypatch.setattr(module, name, None)
    sets, _ = blend.blend_order([0.5, 0.5], 10)
    assert sets.tolist() == [0, 1] * 5
    made = index_map.build_index_map(np.array([5, 9], np.int32), range(2), seq_length=4, epochs=1, seed=1)
    assert len(made) == 3
