"""Stragglers: when a rank is slow, when it is reported, and the content of ranks.jsonl."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from megatron.health import straggler
from megatron.health.straggler import (
    MAX_PROBE_SECONDS,
    MIN_SLOW_REPORTS,
    WINDOW,
    Probe,
    StepTimings,
    StragglerAlarm,
    StragglerMonitor,
)

HOSTS = ("a", "a", "b", "b")
EVEN = StepTimings(1.0, (0.01, 0.02, 0.01, 0.01), (1e-3, 1.1e-3, 1e-3, 0.9e-3))


def test_a_long_product_is_slow_by_its_ratio_to_the_median():
    timings = StepTimings(1.0, (0.0,) * 4, (1e-3, 1e-3, 3e-3, 1.2e-3))
    assert timings.slowness() == pytest.approx([1.0, 1.0, 3.0, 1.2])
    assert timings.reason(2) == "a fixed matrix product takes 3 ms there, 1 ms elsewhere"


def test_waiting_is_slow_by_the_step_without_it():
    """A step of 1 s, of which one rank waits for 0.5 s and the others 0.1 s, would take 0.6 s without that."""
    timings = StepTimings(1.0, (0.1, 0.5, 0.1, 0.1), (1e-3,) * 4)
    assert timings.slowness() == pytest.approx([1.0, 1 / 0.6, 1.0, 1.0])
    assert timings.reason(1) == "it waits 0.5 s a step for its data, others 0.1 s"


def test_when_all_wait_alike_none_is_slow():
    assert StepTimings(1.0, (0.9,) * 4, (1e-3,) * 4).slowness() == [1.0] * 4


def test_a_single_outlier_does_not_show():
    odd = StepTimings(9.0, (0.01, 0.02, 0.01, 5.0), (1e-3, 1.1e-3, 9e-3, 0.9e-3))
    assert straggler.median_timings([EVEN, odd, EVEN]) == EVEN


def slow(rank: int) -> StepTimings:
    return StepTimings(1.0, EVEN.data_wait, tuple(2e-3 if number == rank else 1e-3 for number in range(4)))


def test_a_slow_rank_is_reported_once_and_again_after_it_was_even():
    alarm = StragglerAlarm(HOSTS)
    reported = [alarm.sentences(slow(2)) for _ in range(2 * WINDOW)]
    assert [len(each) for each in reported] == [0] * (MIN_SLOW_REPORTS - 1) + [1] + [0] * (
        2 * WINDOW - MIN_SLOW_REPORTS
    )
    assert reported[MIN_SLOW_REPORTS - 1] == [
        "rank 2 (host b) is a straggler: 2.00 times as slow as the median rank, and at least 1.25 times in 4 of 5 "
        "reports: a fixed matrix product takes 2 ms there, 1 ms elsewhere"
    ]
    assert not any(alarm.sentences(EVEN) for _ in range(WINDOW))
    assert sum(len(alarm.sentences(slow(2))) for _ in range(WINDOW)) == 1


def test_the_reason_is_that_of_the_medians_whatever_the_last_report_says():
    alarm = StragglerAlarm(HOSTS)
    waiting = StepTimings(1.0, (0.1, 0.5, 0.1, 0.1), (1e-3,) * 4)
    last = StepTimings(1.0, waiting.data_wait, (1e-3, 9e-3, 1e-3, 1e-3))
    assert not any(alarm.sentences(waiting) for _ in range(MIN_SLOW_REPORTS - 1))
    (sentence,) = alarm.sentences(last)
    assert "1.67 times" in sentence and "it waits 0.5 s a step for its data, others 0.1 s" in sentence


def test_even_ranks_and_single_outliers_are_not_reported():
    alarm = StragglerAlarm(HOSTS)
    for number in range(40):
        assert alarm.sentences(slow(number % 4) if number % 2 else EVEN) == []


def test_the_products_take_no_longer_than_they_may():
    probe = Probe(torch.device("cpu"))
    began = time.perf_counter()
    least = min(probe.seconds(MAX_PROBE_SECONDS) for _ in range(3))
    assert (time.perf_counter() - began) / 3 < 10 * MAX_PROBE_SECONDS
    assert 1e-6 < least < 0.05


def test_one_rank_is_reported_how_long_it_waits_and_nothing_else(tmp_path: Path):
    one = StragglerMonitor(0, ["a"], torch.device("cpu"), tmp_path, print)
    for iteration in (1, 2):
        with one.recording(iteration), one.waiting():
            time.sleep(0.02)
    measured = one.measure()
    assert list(measured) == ["runtime/data_wait"]
    assert measured["runtime/data_wait"] == pytest.approx(0.02, rel=0.5)
    assert list(tmp_path.iterdir()) == []


def test_the_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(straggler, "MAX_FILE_SIZE", 1000)
    many = StragglerMonitor(0, HOSTS, torch.device("cpu"), tmp_path, print)
    for _ in range(50):
        many._write(EVEN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.jsonl", "ranks.old.jsonl"]
    assert all(path.stat().st_size < 1300 for path in tmp_path.iterdir())
    line = json.loads((tmp_path / "ranks.jsonl").read_text().splitlines()[-1])
    assert line == {
        "iteration": 0,
        "host": list(HOSTS),
        "data_wait": list(EVEN.data_wait),
        "probe": list(EVEN.probe),
    }
