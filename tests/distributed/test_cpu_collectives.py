"""DeepSpeed's compiled CPU collectives: one ninja, and no waiting for a lock that no process holds."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import pytest
import torch

from megatron.distributed.init import init_distributed
from megatron.distributed.op_build import prepend_interpreter_to_path
from megatron.extensions_dir import extensions_folder
from megatron.shared_memory import FOLDER
from tests.multi_rank import run_distributed


def _sum(rank: int, world_size: int) -> float:
    total = torch.tensor([float(rank)])
    torch.distributed.all_reduce(total)
    return total.item()


def test_the_lock_of_a_killed_process_holds_nobody_up() -> None:
    lock = extensions_folder(os.environ) / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    assert run_distributed(_sum, 2) == [1.0, 1.0]
    assert not lock.exists()


def _start_with(rank: int, world_size: int, limited: int | None) -> tuple[bool, float, list[str]]:
    """Whether DeepSpeed's op is used, a sum, and the segments left, where one rank can write 1 MiB at most."""
    import deepspeed.comm.comm

    torch.distributed.destroy_process_group()
    deepspeed.comm.comm.cdb = None  # as in a process that has met no other
    os.environ["LOCAL_SIZE"] = str(world_size)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1, timeout_seconds=60)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = [path.name for path in FOLDER.glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")]
    return deepspeed.comm.comm.cdb.shm_comm_op is not None, _sum(rank, world_size), left


@pytest.mark.parametrize("limited", [None, 0, 1])
def test_without_room_for_a_segment_no_rank_uses_them(limited: int | None) -> None:
    """The op takes a short write for a segment, and a rank dies by a signal when it touches the rest."""
    assert run_distributed(_start_with, 2, limited) == [(limited is None, 1.0, [])] * 2


def test_the_interpreters_own_programs_come_first_and_once() -> None:
    own = str(Path(sys.executable).parent)
    for given in ("/usr/bin:/bin", f"/usr/bin:{own}:/bin", f"{own}:/usr/bin:/bin"):
        environment = {"PATH": given}
        prepend_interpreter_to_path(environment)
        assert environment["PATH"] == f"{own}:/usr/bin:/bin"
