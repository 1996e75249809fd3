"""Of two ranks one is slow, by its data or by its device: log, metrics and ranks.jsonl name it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron.dashboard.runs import open_runs
from megatron.health.straggler import MIN_SLOW_REPORTS
from megatron.metrics.sinks.jsonl import read_metrics
from tests.end_to_end.runs import BASE, run_rank, series
from tests.multi_rank import run_distributed

SPINNING = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


def slowed(rank: int, world_size: int, settings: dict[str, Any], slow: str) -> list[str]:
    """A worker; rank 1 has slow data (and equal products), slow products, or nothing. Returns what the run printed."""
    from megatron.data.dataset.loader import BatchLoader
    from megatron.health.straggler import Probe
    from megatron.metrics.console import Console

    said: list[str] = []
    Console._print = lambda self, text: said.append(text)  # type: ignore[method-assign]
    read, multiply = BatchLoader._read, Probe.multiply
    if slow == "data":
        Probe.multiply = lambda self, count: time.sleep(0.02 * count)  # type: ignore[method-assign]
    if rank == 1 and slow == "data":
        BatchLoader._read = lambda self, numbers: (time.sleep(0.15), read(self, numbers))[1]  # type: ignore[method-assign]
    if rank == 1 and slow == "device":
        Probe.multiply = lambda self, count: multiply(self, 6 * count)  # type: ignore[method-assign]
    run_rank(rank, world_size, settings)
    return said


def trained(dataset: str, folder: Path, slow: str, **settings: Any) -> tuple[list[str], list[dict[str, float]]]:
    """What rank 0 printed, and the records."""
    values = {**BASE, "data_path": dataset, "log_dir": str(folder), "eval_iters": 0, "train_iters": 6, **settings}
    said, _ = run_distributed(slowed, 2, values, slow)
    return said, read_metrics(folder)


@pytest.mark.parametrize(
    ("slow", "reason"), [("data", "it waits 0.1"), ("device", "a fixed matrix product takes ")], ids=["data", "device"]
)
def test_the_slow_rank_is_named(slow: str, reason: str, dataset: str, tmp_path: Path) -> None:
    said, records = trained(dataset, tmp_path, slow)
    host = os.uname().nodename
    (warning,) = [line for line in said if "is a straggler" in line and f"rank 1 (host {host})" in line]
    assert reason in warning
    lines = [line for line in said if line.startswith("iteration ")]
    assert sum(f"slowest rank 1 ({host}) " in line for line in lines) >= MIN_SLOW_REPORTS
    assert series(records, "runtime/slowest_rank").count(1.0) >= MIN_SLOW_REPORTS
    assert sum(ratio > 1.25 for ratio in series(records, "runtime/slowest_rank_ratio")) >= MIN_SLOW_REPORTS
    last = open_runs([tmp_path])[0].ranks()
    assert last.keys() == {"iteration", "host", "data_wait", "probe"}
    assert last["iteration"] == 6 and last["host"] == [host, host]
    if slow == "data":
        waits = series(records, "runtime/data_wait")
        assert min(waits) > 0.14 and waits[-1] == pytest.approx(last["data_wait"][1], rel=1e-3)
        assert last["data_wait"][0] < 0.05


def test_nothing_is_said_of_even_ranks(dataset: str, tmp_path: Path) -> None:
    """Reports of five steps each, so that other work on this machine counts little."""
    said, records = trained(dataset, tmp_path, "nothing", train_iters=25, log_interval=5)
    assert not [line for line in said if "is a straggler" in line]
    assert len(series(records, "runtime/slowest_rank")) == len((tmp_path / "ranks.jsonl").read_text().splitlines()) == 6


def crowded(rank: int, world_size: int, settings: dict[str, Any]) -> None:
    """A worker; both have a core of their own, but rank 1 shares it with three others.

    Reports are seconds apart, so that the products of one take longer than a time slice of the scheduler.
    """
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    run_rank(rank, world_size, settings)


@pytest.mark.long
def test_a_crowded_core_is_found(dataset: str, tmp_path: Path) -> None:
    core = sorted(os.sched_getaffinity(0))[1]
    others = [subprocess.Popen([sys.executable, "-c", SPINNING, str(core)]) for _ in range(3)]
    settings = {"data_path": dataset, "log_dir": str(tmp_path), "eval_iters": 0, "train_iters": 216, "log_interval": 36}
    try:
        run_distributed(crowded, 2, {**BASE, **settings, "train_batch_size": 128}, timeout=500)
    finally:
        for other in others:
            other.kill()
            other.wait()
    slowest = [json.loads(line)["probe"] for line in (tmp_path / "ranks.jsonl").read_text().splitlines()[1:]]
    assert sum(second > 1.25 * first for first, second in slowest) >= MIN_SLOW_REPORTS
