"""Collectives on plain values: what every rank gets, and what a process alone gets."""

from __future__ import annotations

import torch.distributed as dist

from megatron.distributed.process_group import LaterAnyRank, all_gather_items, all_gather_list, any_rank
from tests.multi_rank import run_distributed


def gathered(rank: int, world_size: int) -> tuple[object, ...]:
    last = dist.new_group([2, 3])
    pair = all_gather_list(f"rank {rank}", last), any_rank(rank == 3, last)
    return (
        any_rank(rank == 1),
        any_rank(False),
        all_gather_list({"rank": rank}),
        all_gather_items(range(rank)),
        pair if rank in (2, 3) else None,
    )


def test_every_rank_gets_the_values_of_all_in_order_of_ranks() -> None:
    expected = (True, False, [{"rank": rank} for rank in range(4)], [0, 0, 1, 0, 1, 2])
    pair = (["rank 2", "rank 3"], True)
    assert run_distributed(gathered, 4) == [(*expected, pair if rank in (2, 3) else None) for rank in range(4)]


def test_without_a_process_group_a_process_is_a_world_of_one() -> None:
    assert any_rank(True) and not any_rank(False)
    assert all_gather_list("own") == ["own"]
    assert all_gather_items([3, 4]) == [3, 4]


def answered_later(rank: int, world_size: int) -> list[bool]:
    """Answers to calls of which only the third, on rank 1, is true."""
    asked = LaterAnyRank()
    return [asked(rank == 1 and number == 2) for number in range(5)]


def test_an_answer_of_the_call_before_is_the_same_on_all_ranks() -> None:
    assert run_distributed(answered_later, 2) == [[False, False, False, True, False]] * 2


def test_one_process_is_answered_at_once() -> None:
    asked = LaterAnyRank()
    assert [asked(True), asked(False)] == [True, False]
