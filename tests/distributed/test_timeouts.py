"""Limits on waiting, and who is blamed when one is reached."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from megatron.distributed.timeouts import collective_in_progress, failed_in_a_collective, set_collective_timeout
from megatron.health.heartbeat import STALE, HeartbeatRecord, likely_culprits
from tests.multi_rank import run_distributed

NOW = 1000.0


def late_rank(rank: int, world_size: int) -> tuple[float, bool]:
    """Seconds until rank 0's all-reduce in a group of its own gave up, and whether its error is a collective's."""
    group = dist.new_group([0, 1])
    set_collective_timeout(1.0)
    started, collective = time.monotonic(), False
    if rank == 0:
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError as error:
            collective = failed_in_a_collective(error)
    else:
        time.sleep(2.5)
    seconds = time.monotonic() - started
    set_collective_timeout(60.0)  # for the helper's own barrier
    return seconds, collective


def test_the_limit_holds_in_groups_that_were_made_without_one() -> None:
    """Without it the group waits for gloo's own half hour."""
    (seconds, collective), _ = run_distributed(late_rank, 2)
    assert 0.9 < seconds < 2.3
    assert collective


def record(
    rank: int, *, iteration: int = 5, updated_at: float = NOW, collective_name: str | None = "all_reduce"
) -> HeartbeatRecord:
    return HeartbeatRecord(
        rank, f"host{rank}", 0, iteration, "training", NOW - 20, updated_at, collective_name, "step (x.py:1)"
    )


@pytest.mark.parametrize(
    ("records", "culprits"),
    [
        ([record(0), record(1, updated_at=NOW - STALE - 1), record(2)], [1]),  # frozen or gone
        ([record(0), record(2)], [1]),  # never came
        ([record(0), record(1), record(2, collective_name=None)], [2]),  # busy with something else
        ([record(0), record(1, iteration=4), record(2)], [1]),  # behind: the ranks wait in different collectives
        ([record(0), record(1), record(2)], []),  # no rank stands out
        ([record(0), record(1, updated_at=NOW - 9), record(2, collective_name=None)], [1]),  # a silent rank counts more
    ],
)
def test_who_is_blamed(records: list[HeartbeatRecord], culprits: list[int]) -> None:
    reported = likely_culprits(records, 3, NOW)
    assert [int(sentence.split()[1]) for sentence in reported] == culprits


def test_a_thread_in_no_collective_waits_for_nobody() -> None:
    import threading

    assert collective_in_progress(threading.get_ident()) is None


def test_an_ordinary_error_is_no_collective_that_failed() -> None:
    assert not failed_in_a_collective(RuntimeError("shapes do not match"))
    assert not failed_in_a_collective(ValueError("gloo"))


def test_where_there_are_no_iterations_none_is_reported() -> None:
    assert "stage 0): training for" in str(record(1, iteration=0))
    assert "stage 0) at iteration 5: training for" in str(record(1))
