"""DeepSpeed's operators: one ninja, no waiting for a lock that no process holds, and none that nothing calls."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron.distributed.init import init_distributed
from megatron.distributed.op_build import build_lock, prepend_interpreter_to_path
from megatron.errors import ConfigError
from tests.multi_rank import run_distributed


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    lock = tmp_path / "some_op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    with build_lock(SimpleNamespace(name="some_op")):
        assert not lock.exists()


def test_a_folder_that_cannot_be_made_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/nowhere/made")
    monkeypatch.setenv("PATH", os.environ["PATH"])
    named = r"/proc/nowhere/made: operators cannot be compiled .*; set TORCH_EXTENSIONS_DIR or XDG_CACHE_HOME"
    with pytest.raises(ConfigError, match=named), build_lock(SimpleNamespace(name="some_op")):
        pass


def _start_anew(rank: int, world_size: int) -> tuple[bool, float, list[str]]:
    """Whether DeepSpeed has its shared-memory collectives, a sum by it, and the segments of all runs."""
    import deepspeed.comm

    torch.distributed.destroy_process_group()
    deepspeed.comm.comm.cdb = None  # as in a process that has met no other
    os.environ["LOCAL_SIZE"] = str(world_size)  # with which the op would make segments
    init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1, timeout_seconds=60)
    total = torch.tensor([float(rank)])
    deepspeed.comm.all_reduce(total)
    left = [path.name for path in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")]
    return deepspeed.comm.comm.cdb.shm_comm_op is not None, total.item(), left


def test_collectives_in_shared_memory_are_not_loaded() -> None:
    assert run_distributed(_start_anew, 2) == [(False, 1.0, [])] * 2


def test_the_interpreters_own_programs_come_first_and_once() -> None:
    own = str(Path(sys.executable).parent)
    for given in ("/usr/bin:/bin", f"/usr/bin:{own}:/bin", f"{own}:/usr/bin:/bin"):
        environment = {"PATH": given}
        prepend_interpreter_to_path(environment)
        assert environment["PATH"] == f"{own}:/usr/bin:/bin"
