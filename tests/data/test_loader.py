"""Batches: what they hold, and that neither workers nor the starting point change them."""

import threading

import numpy as np
import pytest
import torch

from megatron.data.dataset.batch import make_batch
from megatron.data.dataset.loader import BatchLoader
from megatron.data.dataset.sampler import BatchSampler


class Numbered:
    """Sample i holds i * 10, i * 10 + 1, ..."""

    sample_length = 5

    def __len__(self):
        return 23

    def read(self, number, out, extras=None):
        out[:] = np.arange(5) + number * 10


def loader(rank=0, ranks=1, micro_batch=2, **settings):
    return BatchLoader(Numbered(), BatchSampler(23, micro_batch, rank, ranks), eod=2, **settings)


def test_labels_are_one_position_on():
    first = next(loader().batches())
    assert first.tokens.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert first.labels.tolist() == [[1, 2, 3, 4], [11, 12, 13, 14]]
    assert first.loss_mask.tolist() == [[1.0] * 4, [1.0] * 4]
    assert (first.tokens.dtype, first.labels.dtype, first.loss_mask.dtype) == (torch.int64, torch.int64, torch.float32)


def test_masked_where_the_input_ends_a_document():
    batch = make_batch(torch.tensor([[7, 2, 8, 2], [2, 9, 9, 9]]), eod=2, eod_mask_loss=True)
    assert batch.loss_mask.tolist() == [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_same_batches_with_any_workers_and_any_start(workers):
    full = [batch.tokens.tolist() for batch in loader().batches()]
    assert len(full) == 11
    for consumed in (0, 2, 10, 22):
        again = [batch.tokens.tolist() for batch in loader(workers=workers).batches(consumed)]
        assert again == full[consumed // 2 :]


def test_two_resumes_one_after_another():
    one = loader(workers=2)
    for consumed in (4, 8):
        assert next(one.batches(consumed)).tokens[0, 0] == consumed * 10


def test_a_error_in_a_worker_reaches_the_caller():
    class Broken(Numbered):
        def read(self, number, out, extras=None):
            raise IndexError("no such sample")

    with pytest.raises(IndexError, match="no such sample"):
        next(BatchLoader(Broken(), BatchSampler(23, 2, 0, 1), eod=0, workers=2).batches())


def test_leaving_early_leaves_no_thread():
    batches = loader(workers=3).batches()
    next(batches)
    batches.close()
    for thread in threading.enumerate():
        if thread.name.startswith("loader"):
            thread.join(5)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
