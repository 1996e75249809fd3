"""Error bars of lm-eval's metrics: infinite where no number holds them, and without processes of their own."""

import math
import os

import pytest
from lm_eval.api import metrics

from megatron.evaluation.error_bars import ONE_PROCESS, infinite_perplexities, one_process


def test_what_no_number_holds_is_infinite():
    with infinite_perplexities():
        assert metrics.perplexity([-1000.0, -2000.0]) == math.inf
        error_bar = metrics.stderr_for_metric(metrics.perplexity, 4)
        assert not math.isfinite(error_bar([-1000.0, -2000.0]))
        assert math.isfinite(metrics.perplexity([-600.0, -700.0])) and error_bar([-600.0, -700.0]) == math.inf
    with pytest.raises(OverflowError):  # lm-eval's own is as it was
        metrics.weighted_perplexity([(-1000.0, 1)])
    with pytest.raises(OverflowError):
        metrics.sample_stddev([1e200, -1e200])


def test_one_process_computes_what_the_pool_does(monkeypatch):
    values = [-1.0, -2.5, -0.3, -4.0]
    error_bar = metrics.stderr_for_metric(metrics.perplexity, 2000)
    expected = error_bar(values)
    monkeypatch.setattr("multiprocessing.Pool", None)
    with one_process():
        assert error_bar(values) == expected
    assert ONE_PROCESS not in os.environ
