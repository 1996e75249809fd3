"""Length and samples of a run that continues another one, whose batch size may have been different."""

from __future__ import annotations

import pytest

from megatron.checkpoint.save.saver import Counters
from megatron.training.data_setup import num_samples, with_length
from tests.inference.small_model import small_config

EIGHT = Counters(iteration=4, consumed_samples=32, consumed_tokens=0)
"""Four steps of 8 samples."""


@pytest.mark.parametrize(
    ("batch", "start", "expected"),
    [
        (8, Counters(), 80),
        (8, EIGHT, 80),
        (2, EIGHT, 32 + 6 * 2),
        (16, EIGHT, 32 + 6 * 16),
        (4, Counters(iteration=10, consumed_samples=80, consumed_tokens=0), 40),  # nothing is left to train
    ],
)
def test_samples_of_a_run_that_continues_with_another_batch_size(batch: int, start: Counters, expected: int) -> None:
    training = small_config(train_batch_size=batch, eval_interval=5, eval_iters=3).training
    assert num_samples(training, 10, start) == {"train": expected, "valid": 3 * 3 * batch, "test": 3 * batch}


@pytest.mark.parametrize(
    ("batch", "start", "expected"),
    [(8, Counters(), 12), (8, EIGHT, 12), (4, EIGHT, 4 + 16), (16, EIGHT, 4 + 4)],
)
def test_train_samples_are_counted_from_those_consumed(batch: int, start: Counters, expected: int) -> None:
    config = small_config(train_batch_size=batch, train_samples=96, train_iters=None)
    assert with_length(config, start).training.train_iters == expected
