"""The share of each rank: all samples once, in order, from any starting point at once."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.data.dataset.sampler import BatchSampler
from megatron.errors import RunError


@given(
    total=st.integers(0, 200),
    micro_batch=st.integers(1, 5),
    data_size=st.integers(1, 4),
    consumed=st.integers(0, 200),
)
def test_ranks_together_take_consecutive_samples(total, micro_batch, data_size, consumed):
    consumed = min(consumed, total)
    ranks = [BatchSampler(total, micro_batch, rank, data_size).batches(consumed) for rank in range(data_size)]
    taken = [number for step in zip(*ranks, strict=True) for batch in step for number in batch]
    full = (total - consumed) // (micro_batch * data_size) * micro_batch * data_size
    assert taken == list(range(consumed, consumed + full))


def test_starting_late_costs_nothing():
    sampler = BatchSampler(10**12, 4, 1, 2)
    before = time.perf_counter()
    assert next(sampler.batches(10**12 - 8)) == range(10**12 - 4, 10**12)
    assert time.perf_counter() - before < 0.1


def test_more_consumed_than_there_is():
    with pytest.raises(RunError, match="sample 11"):
        BatchSampler(10, 1, 0, 1).batches(11)
