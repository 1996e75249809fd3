"""Ranks that cannot meet say where they tried and what to set."""

import os
import socket

import pytest
import torch
import torch.distributed as dist

from megatron.distributed.init import init_distributed
from megatron.errors import ConfigError, RunError
from tests.multi_rank import run_distributed


def meet(rank: int, world_size: int, port: int) -> str:
    """What the first of two processes says that are to meet at a port."""
    import deepspeed.comm.comm

    dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None  # as in a process that has met no other
    os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1, timeout_seconds=5)
    except RunError as error:
        return str(error)
    return ""


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (reported,) = run_distributed(meet, 1, port)
    assert f"rank 0: the ranks cannot meet at 127.0.0.1:{port}" in reported
    assert "set MASTER_PORT to a port that is free there" in reported


def test_ranks_for_gpus_on_a_host_without_one_name_the_variable(monkeypatch) -> None:
    """Other hosts of a hostfile are taken to have GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(ConfigError, match=r"DS_ACCELERATOR = 'cuda'.*torch finds none here.*set DS_ACCELERATOR=cpu"):
        init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1)
