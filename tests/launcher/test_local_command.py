"""The command line and environment of the workers."""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from megatron.launcher.arguments import CHECKOUT
from megatron.launcher.commands.local import (
    Rendezvous,
    local_command,
    rendezvous_port,
    search_paths,
    workers_environment,
)
from megatron.launcher.hosts import Hosts, core_count

WORKER = ("/x/train.py", "--run-config", "/run/config.json")
TWO_CPUS = Hosts({"localhost": (0, 1)}, "cpu", 2)
CLUSTER = Hosts({"first": (0, 1), "second": (3,)}, "cuda", 3)


def test_the_local_command_is_deepspeeds_launcher_with_a_rank_around_each_worker() -> None:
    command = local_command(TWO_CPUS, Rendezvous(master_port=1234), WORKER, Path("/run"), {})
    assert command.argv[:3] == (sys.executable, "-m", "deepspeed.launcher.launch")
    world = next(token for token in command.argv if token.startswith("--world_info=")).partition("=")[2]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": [0, 1]}
    assert "--master_port=1234" in command.argv
    assert command.argv[-7:] == ("--module", "megatron.launcher.rank_agent", "--log-dir", "/run", *WORKER)


def test_cpu_workers_share_the_cores_and_keep_their_memory() -> None:
    environment = workers_environment(TWO_CPUS, {})
    assert environment["OMP_NUM_THREADS"] == str(max(1, core_count() // 2))
    assert environment["DS_ACCELERATOR"] == "cpu"
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        assert 2**29 < int(environment[name]) < 2**31


def test_what_the_user_has_set_stays() -> None:
    assert "OMP_NUM_THREADS" not in workers_environment(TWO_CPUS, {"OMP_NUM_THREADS": "7"})


def test_accelerator_workers_get_no_cpu_settings() -> None:
    assert workers_environment(CLUSTER, {}) == {"DS_ACCELERATOR": "cuda"}


def test_the_checkout_is_found_from_any_folder() -> None:
    paths = search_paths({"PATH": "/bin", "PYTHONPATH": f"/mine:{CHECKOUT}"})
    assert paths == {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), "/mine"])}


def test_a_port_that_is_taken_is_refused_when_it_was_named_and_avoided_when_not() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(ConfigError, match="another process listens on this port"):
            rendezvous_port(taken, given=True)
        assert rendezvous_port(taken, given=False) != taken
