"""The reporter: names, silence of other ranks, and sinks that fail."""

import io
import logging
import math

import pytest

from megatron.config.schema.observe import ObserveSection
from megatron.metrics import Reporter, build_reporter, read_metrics
from megatron.metrics.console import Console
from megatron.metrics.reporter import perplexity


class RecordingSink:
    def __init__(self):
        self.records, self.closed = [], False

    def write(self, iteration, metrics):
        self.records.append((iteration, dict(metrics)))

    def close(self):
        self.closed = True


class FullDisk(RecordingSink):
    def write(self, iteration, metrics):
        raise OSError(28, "No space left on device")


def test_records_reach_every_sink_and_close_reaches_them_once():
    first, second = RecordingSink(), RecordingSink()
    reporter = Reporter([first, second])
    reporter.train(3, {"train/lm_loss": 2.0}, total_iterations=10)
    reporter.evaluation(3, "validation", {"lm_loss": 2.0})
    reporter.close()
    reporter.close()
    assert first.records == second.records
    assert first.records[0] == (3, {"train/lm_loss": 2.0})
    assert first.records[1][1] == pytest.approx({"validation/lm_loss": 2.0, "validation/lm_loss_ppl": 7.38905609893})
    assert first.closed and second.closed


def test_perplexity_of_a_diverged_run_does_not_raise():
    assert perplexity(1e4) == math.inf


def test_a_full_disk_is_reported_once_and_the_other_sink_goes_on(monkeypatch):
    reported = []
    monkeypatch.setattr(logging.Logger, "warning", lambda self, text, *args: reported.append(text % args))
    retained = RecordingSink()
    reporter = Reporter([FullDisk(), retained])
    for iteration in (1, 2, 3):
        reporter.train(iteration, {"train/lm_loss": 2.0}, total_iterations=3)
    assert [iteration for iteration, _ in retained.records] == [1, 2, 3]
    assert len(reported) == 1 and "No space left" in reported[0]


def test_rank_0_writes_and_other_ranks_are_silent(tmp_path, capsys):
    observe = ObserveSection(log_dir=str(tmp_path), tensorboard_dir=str(tmp_path / "board"))
    for rank in (0, 1):
        reporter = build_reporter(observe, rank)
        reporter.train(1, {"train/lm_loss": 2.0}, total_iterations=4)
        reporter.message("hello")
        reporter.close()
    assert capsys.readouterr().out.count("hello") == 1
    assert read_metrics(tmp_path) == [{"iteration": 1, "train/lm_loss": 2.0}]


def test_tensorboard_holds_the_scalars_and_hides_what_was_done_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observe = ObserveSection(log_dir=None, tensorboard_dir=str(tmp_path))
    for start, last, offset in ((0, 5, 0.0), (3, 4, 10.0)):
        reporter = build_reporter(observe, 0, start_iteration=start)
        for iteration in range(start + 1, last + 1):
            reporter.train(iteration, {"train/lm_loss": offset + iteration}, total_iterations=9)
        reporter.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/lm_loss")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 14.0)]


def test_the_console_hears_what_the_sinks_hear():
    out = io.StringIO()
    reporter = Reporter([], Console(out, live=False))
    reporter.evaluation(7, "test", {"lm_loss": 1.0})
    assert out.getvalue() == "test at iteration 7 | lm_loss 1.0000 | lm_loss_ppl 2.7183\n"
