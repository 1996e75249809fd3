"""DeepSpeed's compiled CPU collectives: one ninja, and no waiting for a lock that no process holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from megatron.distributed.op_build import prepend_interpreter_to_path
from megatron.extensions_dir import extensions_folder
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


def test_the_interpreters_own_programs_come_first_and_once() -> None:
    own = str(Path(sys.executable).parent)
    for given in ("/usr/bin:/bin", f"/usr/bin:{own}:/bin", f"{own}:/usr/bin:/bin"):
        environment = {"PATH": given}
        prepend_interpreter_to_path(environment)
        assert environment["PATH"] == f"{own}:/usr/bin:/bin"
