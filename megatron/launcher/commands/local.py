"""Command line and environment of the workers on this host.

DeepSpeed's per-node launcher is called directly; its runner would only choose the same command after importing
DeepSpeed once more. `multi_host` has the commands for other hosts. Either way every rank is a
`megatron.launcher.rank_agent`, and the workers read the configuration from a file: some schedulers truncate a command
line that contains it.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import ConfigError
from megatron.launcher.arguments import CHECKOUT
from megatron.launcher.hosts import Hosts, core_count
from megatron.launcher.rank_agent import SAFE_PATH, SAFE_PATH_OF_AGENT
from megatron.ranks import free_port

RANK_MODULE = "megatron.launcher.rank_agent"
DEFAULT_PORT = 29500
# By default glibc returns freed memory to the kernel at every step. Both values are below 2^31, since older versions
# read them as an int.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2_000_000_000)}


@dataclass(frozen=True)
class Rendezvous:
    """Address and launcher of the ranks."""

    master_addr: str | None = None
    """Address of rank 0."""
    master_port: int = DEFAULT_PORT
    """Port of rank 0."""
    launcher: str = "pdsh"
    """One of `multi_host.LAUNCHERS`, torchrun or local."""
    launcher_args: str = ""
    """Further arguments of the launcher."""
    comment: str | None = None
    """Comment of the Slurm job."""
    account: str | None = None
    """Account of the Slurm job."""
    supervisor: str | None = None
    """Address at which ranks on other hosts report to deepy.py; None without one."""
    node: int = 0
    """Number of this host among those that run torchrun."""


@dataclass(frozen=True)
class Command:
    """A command that starts all ranks."""

    argv: tuple[str, ...]
    """Program and arguments."""
    environment: dict[str, str]
    """Variables to set on top of the caller's."""
    hostfile: str | None = None
    """Content of the hostfile that argv names; None without one."""


def workers_environment(machines: Hosts, caller: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of every worker that the caller has not set."""
    selection: dict[str, str] = {"DS_ACCELERATOR": machines.accelerator}
    if machines.accelerator == "cpu":
        ranks = max(len(slots) for slots in machines.hosts.values())
        selection["OMP_NUM_THREADS"] = str(max(1, core_count() // max(1, ranks)))
        selection |= KEEP_FREED_MEMORY
        if machines.is_local:
            selection["GLOO_SOCKET_IFNAME"] = "lo"  # a host name that does not resolve must not matter on one machine
    return {name: value for name, value in selection.items() if name not in caller}


def search_paths(caller: Mapping[str, str]) -> dict[str, str]:
    """Returns PYTHONPATH with this checkout, so that workers find it from any folder."""
    others = [part for part in caller.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(CHECKOUT)]
    return {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), *others])}


def safe_path(caller: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that take the working folder from the search path of launchers and agents, which `-m` puts
    first: a script there may have the name of a module of the standard library. Workers do without them.
    """
    return {} if SAFE_PATH in caller else {SAFE_PATH: "1", SAFE_PATH_OF_AGENT: "1"}


def local_command(
    machines: Hosts, rendezvous: Rendezvous, worker: tuple[str, ...], log_dir: Path, caller: Mapping[str, str]
) -> Command:
    """Returns the command of DeepSpeed's launcher of one node.

    Args:
        machines: this host and its slots.
        rendezvous: address and port of rank 0.
        worker: the script and its arguments.
        log_dir: folder of the rank logs.
        caller: the environment of deepy.py.
    """
    world = base64.urlsafe_b64encode(json.dumps({host: list(slots) for host, slots in machines.hosts.items()}).encode())
    argv = (
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={world.decode()}",
        f"--master_addr={rendezvous.master_addr or '127.0.0.1'}",
        f"--master_port={rendezvous.master_port}",
        "--log_level=error",
        "--no_local_rank",
        "--module",
        RANK_MODULE,
        "--log-dir",
        str(log_dir),
        *worker,
    )
    return Command(argv, {**search_paths(caller), **safe_path(caller), **workers_environment(machines, caller)})


def torchrun_command(
    machines: Hosts, rendezvous: Rendezvous, worker: tuple[str, ...], log_dir: Path, caller: Mapping[str, str]
) -> Command:
    """Returns the command of torchrun on this host; every other host starts its own.

    Args:
        machines: all hosts of the run.
        rendezvous: address and port of rank 0, and the number of this host.
        worker: the script and its arguments.
        log_dir: folder of the rank logs.
        caller: the environment of deepy.py.
    """
    hosts = list(machines.hosts)
    here = hosts[rendezvous.node]
    argv = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={len(hosts)}",
        f"--node-rank={rendezvous.node}",
        f"--nproc-per-node={len(machines.hosts[here])}",
        f"--master-addr={rendezvous.master_addr or '127.0.0.1'}",
        f"--master-port={rendezvous.master_port}",
        *shlex.split(rendezvous.launcher_args),
        "--module",
        RANK_MODULE,
        "--log-dir",
        str(log_dir),
        *worker,
    )
    return Command(argv, {**search_paths(caller), **safe_path(caller), **workers_environment(machines, caller)})


def rendezvous_port(port: int, *, given: bool) -> int:
    """Returns the port of local ranks: the given one, else a free one. Raises ConfigError when it is taken."""
    try:
        return free_port(port if given else 0)
    except OSError as error:
        raise ConfigError.of(
            "another process listens on this port",
            key="master_port",
            value=port,
            hint="name another, or none to get a free one",
        ) from error
