"""Ranks that cannot meet say where they tried and what to set."""

import os
import socket
import subprocess
import sys
from pathlib import Path

CODE = """
from megatron.errors import RunError
from megatron.distributed.init import init_distributed
try:
    init_distributed(pipe_parallel_size=0, model_parallel_size=1, seed=1, timeout_seconds=5)
except RunError as error:
    print(error)
"""


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        position = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, "-c", CODE],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **position, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert f"rank 0: the ranks cannot meet at 127.0.0.1:{port}" in done.stdout, done.stderr
    assert "set MASTER_PORT to a port that is free there" in done.stdout
