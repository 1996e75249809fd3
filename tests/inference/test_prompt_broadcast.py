"""Ranks that wait for a person wait longer than they may wait for each other."""

from __future__ import annotations

import time

from megatron.distributed.process_group import any_rank
from megatron.distributed.timeouts import set_collective_timeout
from megatron.inference.prompt_broadcast import broadcast_prompt
from tests.multi_rank import run_distributed

LIMIT = 1.0  # [s]
THOUGHTS = (3.0, 0.0, 1.5)  # [s] before each prompt


def slow_typist(rank: int, world_size: int) -> tuple[list[str | None], bool, bool]:
    """What every rank hears of two prompts and the end, and whether rank 1's wish reached it."""
    set_collective_timeout(LIMIT)
    typed, thoughts = iter(["hello", "", None]), iter(THOUGHTS)

    def ask() -> str | None:
        assert rank == 0, "only rank 0 has a terminal"
        time.sleep(next(thoughts))
        return next(typed)

    received = [broadcast_prompt(ask, limit=LIMIT) for _ in range(3)]
    wished = any_rank(rank == 1), any_rank(False)
    set_collective_timeout(60.0)  # for the helper's own barrier
    return received, *wished


def test_a_person_may_think_for_longer_than_ranks_wait() -> None:
    assert run_distributed(slow_typist, 2) == [(["hello", "", None], True, False)] * 2


def test_one_rank_asks_for_itself() -> None:
    assert broadcast_prompt(lambda: "hello", limit=LIMIT) == "hello"
    assert any_rank(True) and not any_rank(False)
