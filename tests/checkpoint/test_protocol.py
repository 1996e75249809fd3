"""Ranks that do something together agree on whether it went well, however long one of them takes."""

from __future__ import annotations

import time

import pytest

from megatron.checkpoint.save.protocol import run_with_heartbeat
from megatron.errors import RunError
from tests.multi_rank import run_distributed


def slow_on_one(rank: int, world_size: int, fails: bool) -> tuple[str, float]:
    """Rank 1 works for a second, a failure at its end; the ranks meet ten times meanwhile."""
    started = time.monotonic()

    def work() -> None:
        if rank == 1:
            time.sleep(1.0)
            if fails:
                raise OSError("the disk is full")

    try:
        run_with_heartbeat(work, "writing", beat=0.1)
    except RunError as error:
        return str(error), time.monotonic() - started
    return "", time.monotonic() - started


@pytest.mark.parametrize("fails", [False, True])
def test_all_wait_for_the_slowest_and_hear_of_its_failure(fails: bool) -> None:
    (first, took), (second, _) = run_distributed(slow_on_one, 2, fails)
    assert took > 0.5, "the ranks do not start at the same moment"
    assert first == (
        "writing failed: another rank failed; the checkpoints written before are complete" if fails else ""
    )
    assert ("the disk is full" in second) == fails
