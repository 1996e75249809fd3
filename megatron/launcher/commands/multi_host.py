"""The commands that start ranks on other hosts: DeepSpeed's runner where it has one, jsrun and Flux beside it.

What DeepSpeed's runner does not do is done here: the hosts and slots chosen by our keys become a hostfile of the run's
own, since its MPI runners refuse a choice of hosts; where the ranks meet is said to all of them; settings travel as
arguments of `megatron.launcher.rank_agent`, since the runner exports few variables.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import ConfigError
from megatron.launcher.arguments import CHECKOUT
from megatron.launcher.commands.local import (
    DEFAULT_PORT,
    RANK_MODULE,
    Command,
    Rendezvous,
    search_paths,
    workers_environment,
)
from megatron.launcher.hosts import Hosts
from megatron.launcher.rank_agent import SOCKET_VARIABLE
from megatron.registry import PLUGINS

HOSTFILE = "hostfile"
HANDED_ON = ("GLOO_", "NCCL_", "TORCH_NCCL_", "OMP_", "DS_ACCELERATOR", "HF_HOME", "HF_HUB_OFFLINE", "MALLOC_", PLUGINS)
"""Variables of the caller that ranks on other hosts get as well; none of them is a secret."""
RANK_FILE = CHECKOUT / "megatron" / "launcher" / "rank_agent.py"


@dataclass(frozen=True)
class Launch:
    """What every launcher needs to know. rank: the arguments of one rank. folder: the run directory."""

    machines: Hosts
    rendezvous: Rendezvous
    rank: tuple[str, ...]
    folder: Path

    @property
    def first(self) -> str:
        return next(iter(self.machines.hosts))

    @property
    def slots(self) -> int:
        """Ranks on each host. Raises ConfigError where hosts have different numbers of them."""
        counts = {host: len(slots) for host, slots in self.machines.hosts.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{host} {count}" for host, count in counts.items())
            raise self.error(f"it starts as many ranks on every host, and these have {told}", "even them with num_gpus")
        return next(iter(counts.values()))

    def whole_hosts(self) -> None:
        """Raises ConfigError where single slots were chosen, for launchers that only count."""
        for host, slots in self.machines.hosts.items():
            if slots != tuple(range(len(slots))):
                raise self.error(f"it cannot choose the slots {list(slots)} of {host}", "choose hosts, or use pdsh")

    def error(self, what: str, hint: str) -> ConfigError:
        return ConfigError.of(what, key="launcher", value=self.rendezvous.launcher, hint=hint)


def multi_host_command(
    machines: Hosts, rendezvous: Rendezvous, worker: tuple[str, ...], log_dir: Path, caller: Mapping[str, str]
) -> Command:
    """The command of the launcher that `rendezvous` names. worker: the script and its arguments."""
    handed_on = {name: value for name, value in caller.items() if name.startswith(HANDED_ON)}
    settings = [f"{name}={value}" for name, value in {**workers_environment(machines, {}), **handed_on}.items()]
    if rendezvous.supervisor is not None:
        settings.append(f"{SOCKET_VARIABLE}={rendezvous.supervisor}")
    build = LAUNCHERS[rendezvous.launcher]
    if build is not _pdsh:
        launch = Launch(machines, rendezvous, (), log_dir)
        launch.whole_hosts()
    if build in (_mpi, _even_mpi, _jsrun, _flux):
        settings += [f"MASTER_ADDR={rendezvous.master_addr or launch.first}", f"MASTER_PORT={rendezvous.master_port}"]
    if build is _slurm and rendezvous.master_addr is not None:
        settings.append(f"MASTER_ADDR={rendezvous.master_addr}")
    if build is _slurm and rendezvous.master_port != DEFAULT_PORT:
        settings.append(f"MASTER_PORT={rendezvous.master_port}")
    rank = ("--log-dir", str(log_dir), *settings, *worker)
    hostfile = "".join(f"{host} slots={_slots_in_file(slots)}\n" for host, slots in machines.hosts.items())
    return Command(build(Launch(machines, rendezvous, rank, log_dir)), search_paths(caller), hostfile)


def _slots_in_file(slots: tuple[int | str, ...]) -> int:
    """How many slots a hostfile must offer for these to be among them."""
    return max([len(slots), *(slot + 1 for slot in slots if isinstance(slot, int))])


def _runner(launch: Launch, *options: str, arguments: str = "") -> tuple[str, ...]:
    """DeepSpeed's runner."""
    rendezvous = launch.rendezvous
    given = " ".join(part for part in (rendezvous.launcher_args, arguments) if part)
    found = (
        f"--hostfile={launch.folder / HOSTFILE}",
        f"--master_addr={rendezvous.master_addr or launch.first}",
        f"--master_port={rendezvous.master_port}",
        f"--launcher={rendezvous.launcher}",
        *((f"--launcher_args={given}",) if given else ()),
        "--force_multi",
        "--no_ssh_check",  # asked before, of every host
        "--log_level=error",
    )
    return (sys.executable, "-m", "deepspeed.launcher.runner", *found, *options)


def _pdsh(launch: Launch) -> tuple[str, ...]:
    hosts = launch.machines.hosts.items()
    include = "@".join(f"{host}:{','.join(str(slot) for slot in slots)}" for host, slots in hosts)
    options = (f"--include={include}", "--no_local_rank", "--module")
    return (*_runner(launch, *options), RANK_MODULE, *launch.rank)


def _mpi(launch: Launch) -> tuple[str, ...]:
    """OpenMPI. The workers do not speak MPI, so the network that its own messages take does not matter.

    The rank's file is named, since DeepSpeed's runner for MPICH takes its own helper for a module otherwise.
    """
    return (*_runner(launch), str(RANK_FILE), *launch.rank)


def _even_mpi(launch: Launch) -> tuple[str, ...]:
    """MPICH, Intel MPI and MVAPICH, which place as many ranks on every host."""
    assert launch.slots
    return _mpi(launch)


def _slurm(launch: Launch) -> tuple[str, ...]:
    """Srun. DeepSpeed's runner for it knows no modules, so the rank's file is named; srun names the meeting point."""
    options = [f"--ntasks-per-node={launch.slots}", f"--nodes={len(launch.machines.hosts)}"]
    if launch.machines.named:
        options.append(f"--nodelist={','.join(launch.machines.hosts)}")
    options += [f"--{name}={value}" for name in ("comment", "account") if (value := getattr(launch.rendezvous, name))]
    if launch.machines.accelerator == "cuda" and "--gpus" not in launch.rendezvous.launcher_args:
        options.append(f"--gpus-per-node={launch.slots}")
    arguments = " ".join(shlex.quote(option) for option in options)
    return (*_runner(launch, arguments=arguments), str(RANK_FILE), *launch.rank)


def _jsrun(launch: Launch) -> tuple[str, ...]:
    """IBM's jsrun under LSF: a resource set is a whole host."""
    slots, hosts = launch.slots, len(launch.machines.hosts)
    gpus = ("--gpu_per_rs", str(slots)) if launch.machines.accelerator == "cuda" else ()
    return (
        *("jsrun", "--nrs", str(hosts), "--rs_per_host", "1", "--tasks_per_rs", str(slots)),
        *("--cpu_per_rs", "ALL_CPUS", *gpus, "--launch_distribution", "packed", "--bind", "none"),
        *shlex.split(launch.rendezvous.launcher_args),
        *(sys.executable, "-u", str(RANK_FILE), *launch.rank),
    )


def _flux(launch: Launch) -> tuple[str, ...]:
    slots, hosts = launch.slots, len(launch.machines.hosts)
    gpus = ("--gpus-per-node", str(slots)) if launch.machines.accelerator == "cuda" else ()
    named = (f"--requires=host:{','.join(launch.machines.hosts)}",) if launch.machines.named else ()
    return (
        *("flux", "run", "--nodes", str(hosts), "--tasks-per-node", str(slots), *gpus, "--exclusive"),
        *("-o", "mpi=none", "-o", "cpu-affinity=off", *named),
        *shlex.split(launch.rendezvous.launcher_args),
        *(sys.executable, "-u", str(RANK_FILE), *launch.rank),
    )


LAUNCHERS: Mapping[str, Callable[[Launch], tuple[str, ...]]] = {
    "pdsh": _pdsh,
    "openmpi": _mpi,
    "mpich": _even_mpi,
    "impi": _even_mpi,
    "mvapich": _even_mpi,
    "slurm": _slurm,
    "jsrun": _jsrun,
    "flux": _flux,
}
"""A launcher is one function of a Launch, which returns the argv that starts all ranks."""

PROGRAMS = {
    "pdsh": ("pdsh", "ssh"),
    "openmpi": ("mpirun", "ompi_info"),
    "mpich": ("mpirun",),
    "impi": ("mpirun",),
    "mvapich": ("mpirun", "mpiname"),
    "slurm": ("srun", "sinfo"),
    "jsrun": ("jsrun",),
    "flux": ("flux",),
}
"""What must be installed on this host for a launcher."""

OVER_SSH = frozenset(("pdsh", "openmpi", "mpich", "impi", "mvapich"))
"""Launchers that reach other hosts by ssh, unless the site has another way."""
