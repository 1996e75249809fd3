"""The command line and environment that start the workers.

On this host DeepSpeed's per-node launcher is called directly; its runner would only choose the same command after
importing DeepSpeed once more. `elsewhere` has the commands for other hosts. Either way every rank is a
`megatron.launcher.rank_agent`, and the workers read the configuration from a file: a command line that carries it is
cut or mangled by some schedulers.
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
from megatron.ranks import free_port

RANK_MODULE = "megatron.launcher.rank_agent"
DEFAULT_PORT = 29500
# glibc hands freed memory back to the kernel at every step unless told to keep it; both stay below 2^31, since older
# versions read them as an int.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2_000_000_000)}


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks meet and who starts them: keys of the launch section.

    launcher: one of `elsewhere.LAUNCHERS`, torchrun or local. supervisor: the address at which ranks on other hosts
    report to deepy.py, None where none listens. node: number of this host among those that run torchrun.
    """

    master_addr: str | None = None
    master_port: int = DEFAULT_PORT
    launcher: str = "pdsh"
    launcher_args: str = ""
    comment: str | None = None
    account: str | None = None
    supervisor: str | None = None
    node: int = 0


@dataclass(frozen=True)
class Command:
    """argv: what to execute. environment: only the variables that are set on top of the caller's.

    hostfile: what must be in the file that argv names as one, None where it names none.
    """

    argv: tuple[str, ...]
    environment: dict[str, str]
    hostfile: str | None = None


def workers_environment(machines: Hosts, caller: Mapping[str, str]) -> dict[str, str]:
    """The variables that every worker gets; what the caller has set stays."""
    wanted: dict[str, str] = {"DS_ACCELERATOR": machines.accelerator}
    if machines.accelerator == "cpu":
        ranks = max(len(slots) for slots in machines.hosts.values())
        wanted["OMP_NUM_THREADS"] = str(max(1, core_count() // max(1, ranks)))
        wanted |= KEEP_FREED_MEMORY
        if machines.is_local:
            wanted["GLOO_SOCKET_IFNAME"] = "lo"  # a host name that does not resolve must not matter on one machine
    return {name: value for name, value in wanted.items() if name not in caller}


def search_paths(caller: Mapping[str, str]) -> dict[str, str]:
    """PYTHONPATH with this checkout, so that workers find it from any folder."""
    others = [part for part in caller.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(CHECKOUT)]
    return {"PYTHONPATH": os.pathsep.join([str(CHECKOUT), *others])}


def local_command(
    machines: Hosts, rendezvous: Rendezvous, worker: tuple[str, ...], log_dir: Path, caller: Mapping[str, str]
) -> Command:
    """DeepSpeed's launcher of one node. worker: the script and its arguments."""
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
    return Command(argv, {**search_paths(caller), **workers_environment(machines, caller)})


def torchrun_command(
    machines: Hosts, rendezvous: Rendezvous, worker: tuple[str, ...], log_dir: Path, caller: Mapping[str, str]
) -> Command:
    """Torchrun on this host, one of as many as the run has; the others start theirs in the same way."""
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
    return Command(argv, {**search_paths(caller), **workers_environment(machines, caller)})


def meeting_port(port: int, *, given: bool) -> int:
    """The port at which local ranks meet: the given one, or any free one where the user named none.

    Raises ConfigError when the given one is taken.
    """
    try:
        return free_port(port if given else 0)
    except OSError as error:
        raise ConfigError.of(
            "another process listens on this port",
            key="master_port",
            value=port,
            hint="name another, or none to get a free one",
        ) from error
