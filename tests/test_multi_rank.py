"""The helper that runs a function on N ranks: it returns, fails, ends and costs as it says."""

from __future__ import annotations

import os
import statistics
import time

import pytest
import torch
import torch.distributed

from tests.multi_rank import RankFailedError, run_distributed


def _sum_over_ranks(rank: int, world_size: int, offset: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([float(rank + offset)])
    torch.distributed.all_reduce(total)
    return rank, total


def _surroundings(rank: int, world_size: int) -> dict[str, object]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "COLOUR")
    found: dict[str, object] = {name: os.environ.get(name) for name in names}
    return found | {"folder": os.getcwd(), "threads": torch.get_num_threads()}


def _last_rank_raises(rank: int, world_size: int) -> None:
    if rank == world_size - 1:
        print("a word before the end")
        raise ValueError("the last rank cannot go on")
    torch.distributed.barrier()


def _first_rank_dies(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(7)
    torch.distributed.barrier()


def _hang(rank: int, world_size: int, folder: str) -> None:
    with open(os.path.join(folder, str(rank)), "w") as note:
        note.write(str(os.getpid()))
    time.sleep(600)


def test_results_come_in_rank_order_and_ranks_talk_to_each_other() -> None:
    results = run_distributed(_sum_over_ranks, 3, 10)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert [total.item() for _, total in results] == [33.0, 33.0, 33.0]


def test_ranks_see_their_position_and_the_environment_and_folder_of_the_caller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("COLOUR", "green")
    monkeypatch.chdir(str(tmp_path))
    first, second = run_distributed(_surroundings, 2)
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert (first["LOCAL_RANK"], second["LOCAL_RANK"]) == ("0", "1")
    assert first["WORLD_SIZE"] == "2" and first["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"] != "0"
    assert first["COLOUR"] == "green" and first["folder"] == str(tmp_path)
    assert first["threads"] == 1


def test_an_exception_on_one_rank_fails_the_call_at_once_with_its_traceback() -> None:
    before = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 1 of 2 failed") as caught:
        run_distributed(_last_rank_raises, 2)
    assert time.monotonic() - before < 20
    assert "ValueError: the last rank cannot go on" in str(caught.value)
    assert "_last_rank_raises" in str(caught.value)
    assert "a word before the end" in str(caught.value)


def test_a_rank_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(RankFailedError, match="rank 0 of 2 failed:\nit ended without an answer, exit code 7"):
        run_distributed(_first_rank_dies, 2)


def test_a_hang_ends_at_the_timeout_says_where_and_leaves_no_process(tmp_path: object) -> None:
    with pytest.raises(RankFailedError, match="no answer from rank 0, 1 of 2 in time") as caught:
        run_distributed(_hang, 2, str(tmp_path), timeout=5)
    assert "in _hang" in str(caught.value)
    for rank in ("0", "1"):
        with open(os.path.join(str(tmp_path), rank)) as note:
            assert not os.path.exists(f"/proc/{note.read()}")


def test_a_call_on_two_ranks_costs_about_a_second() -> None:
    run_distributed(_sum_over_ranks, 2, 0)
    costs = []
    for _ in range(3):
        before = time.monotonic()
        run_distributed(_sum_over_ranks, 2, 0)
        costs.append(time.monotonic() - before)
    assert statistics.median(costs) < 4.0
