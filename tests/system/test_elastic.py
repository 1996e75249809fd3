"""torchrun starts ranks again on two hosts of two: one is killed, all go on together, and nothing is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.runs import run, series
from tests.system.training import ROOT, SCHEDULE, losses, wait_until_saved, write

pytestmark = pytest.mark.long

NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Each start meets in a store of its own; else torchrun keeps starts apart by a number that differs between hosts."""


def agent(folder: Path, number: int, port: int) -> subprocess.Popen[bytes]:
    """An agent of torchrun, as it is started on one of two hosts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    command += ["--rdzv-id", "neox", "--monitor-interval", "0.2", str(ROOT / "train.py"), "run.json"]
    with (folder / f"agent{number}.txt").open("wb") as said:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **NEW_STORE, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=said,
        )


def worker(agents: list[subprocess.Popen[bytes]], rank: int) -> psutil.Process:
    """The process of a rank."""
    for each in agents:
        for child in psutil.Process(each.pid).children(recursive=True):
            if child.environ().get("RANK") == str(rank):
                return child
    raise AssertionError(f"no worker of rank {rank}")


@pytest.mark.parametrize("killed", [1, 3], ids=["beside rank 0", "on the other host"])
def test_a_killed_rank_costs_no_step(killed: int, dataset: str, tmp_path: Path) -> None:
    """`load` is not given: that torchrun has started the ranks before is enough, on whichever host it counted that."""
    write(tmp_path, dataset, load=None, train_iters=40, lr_decay_iters=40, collective_timeout=30)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    agents = [agent(tmp_path, number, port) for number in range(2)]
    try:
        wait_until_saved(tmp_path, 240)
        worker(agents, killed).send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 300
        while any(each.poll() is None for each in agents):
            assert time.monotonic() < deadline, said(tmp_path)
            time.sleep(0.2)
    finally:
        for each in agents:
            each.kill()
    assert [each.returncode for each in agents] == [0, 0], said(tmp_path)
    assert "continuing after iteration" in said(tmp_path)
    schedule = {**SCHEDULE, "train_iters": 40, "lr_decay_iters": 40}
    assert losses(tmp_path) == series(run(4, tmp_path / "whole", data_path=dataset, **schedule), "train/lm_loss")


def said(folder: Path) -> str:
    return "".join((folder / f"agent{number}.txt").read_text() for number in range(2))
