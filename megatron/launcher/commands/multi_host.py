"""Commands that start ranks on other hosts: DeepSpeed's runner where it has one, jsrun and Flux beside it.

Additions to DeepSpeed's runner: the selected hosts and slots become a hostfile of the run, since its MPI runners reject
a selection of hosts; every rank gets the address of rank 0; variables are passed as arguments of
`megatron.launcher.rank_agent`, since the runner exports few variables.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import ConfigError, ConfigIssue
from megatron.launcher.arguments import CHECKOUT
from megatron.launcher.commands.local import (
    DEFAULT_PORT,
    RANK_MODULE,
    Command,
    Rendezvous,
    search_paths,
    workers_environment,
)
from megatron.launcher.env_file import check_env_files
from megatron.launcher.hosts import Hosts, without_user
from megatron.launcher.rank_agent import SOCKET_VARIABLE
from megatron.registry import PLUGINS

HOSTFILE = "hostfile"
FORWARDED_ENV = (
    "GLOO_",
    "NCCL_",
    "TORCH_NCCL_",
    "OMP_",
    "DS_ACCELERATOR",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "MALLOC_",
    PLUGINS,
)
"""Variables of the caller that ranks on other hosts get as well; none of them is a secret."""
_CHANGED_BY_SHELLS = re.compile(r"[\s|&;<>()$`\\\"'*?\[\]{}!#~^%]")  # pdsh itself replaces what follows a %
_UNQUOTED = re.compile(r"[A-Za-z0-9_@%+=:./-]*")
"""What DeepSpeed's runner hands to every launcher as it is; srun would split values at commas."""
RANK_FILE = CHECKOUT / "megatron" / "launcher" / "rank_agent.py"


@dataclass(frozen=True)
class Launch:
    """Input of every launcher's command."""

    machines: Hosts
    """Hosts of the run."""
    rendezvous: Rendezvous
    """Address of rank 0 and launcher."""
    rank: tuple[str, ...]
    """Arguments of one rank."""
    folder: Path
    """The run directory."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """The hosts without users."""
        return tuple(without_user(host) for host in self.machines.hosts)

    @property
    def meeting(self) -> str:
        """The address of rank 0."""
        return self.rendezvous.master_addr or self.addresses[0]

    @property
    def slots(self) -> int:
        """Ranks per host. Raises ConfigError when the hosts differ."""
        counts = {host: len(slots) for host, slots in self.machines.hosts.items()}
        if len(set(counts.values())) > 1:
            ranks_by_host = ", ".join(f"{host} {count}" for host, count in counts.items())
            raise self.error(
                f"it starts as many ranks on every host, and these have {ranks_by_host}", "even them with num_gpus"
            )
        return next(iter(counts.values()))

    def require_full_hosts(self, hint: str = "choose hosts, or use pdsh") -> None:
        """Raises ConfigError when some slots of a host were selected, for launchers that only count."""
        for host, slots in self.machines.hosts.items():
            if slots != tuple(range(len(slots))):
                raise self.error(f"it cannot choose the slots {list(slots)} of {host}", hint)

    def error(self, what: str, hint: str) -> ConfigError:
        return ConfigError.of(what, key="launcher", value=self.rendezvous.launcher, hint=hint)


def multi_host_command(
    machines: Hosts, rendezvous: Rendezvous, worker: tuple[str, ...], log_dir: Path, caller: Mapping[str, str]
) -> Command:
    """Returns the command of a launcher for several hosts.

    Args:
        machines: the hosts of the run.
        rendezvous: address of rank 0, and the launcher.
        worker: the script and its arguments.
        log_dir: folder of the rank logs.
        caller: the environment of deepy.py.
    """
    forwarded = {name: value for name, value in caller.items() if name.startswith(FORWARDED_ENV)}
    settings = [f"{name}={value}" for name, value in {**workers_environment(machines, {}), **forwarded}.items()]
    if rendezvous.supervisor is not None:
        settings.append(f"{SOCKET_VARIABLE}={rendezvous.supervisor}")
    build = LAUNCHERS[rendezvous.launcher]
    if build not in (_jsrun, _flux):  # all others are DeepSpeed's runner
        check_env_files(caller, Path.cwd())
    if build is not _pdsh:
        launch = Launch(machines, rendezvous, (), log_dir)
        launch.require_full_hosts()
    if build in (_mpi, _uniform_mpi, _jsrun, _flux):
        settings += [f"MASTER_ADDR={launch.meeting}", f"MASTER_PORT={rendezvous.master_port}"]
    if build is _slurm and rendezvous.master_addr is not None:
        settings.append(f"MASTER_ADDR={rendezvous.master_addr}")
    if build is _slurm and rendezvous.master_port != DEFAULT_PORT:
        settings.append(f"MASTER_PORT={rendezvous.master_port}")
    paths = os.pathsep.join([str(Path.cwd()), *search_paths(caller).values()])  # as the runner joins them
    if build in (_mpi, _uniform_mpi, _slurm) and not _UNQUOTED.fullmatch(paths):
        settings.append(f"PYTHONPATH={paths}")  # the runner's double quotes would become a part of the value
    rank = ("--log-dir", str(log_dir), *settings, *worker)
    hostfile = "".join(f"{host} slots={_slots_in_file(slots)}\n" for host, slots in machines.hosts.items())
    return Command(build(Launch(machines, rendezvous, rank, log_dir)), search_paths(caller), hostfile)


def _slots_in_file(slots: tuple[int | str, ...]) -> int:
    """Returns the number of slots that a hostfile must list to contain these."""
    return max([len(slots), *(slot + 1 for slot in slots if isinstance(slot, int))])


def _runner(launch: Launch, *options: str, arguments: str = "") -> tuple[str, ...]:
    """Returns the command of DeepSpeed's runner."""
    rendezvous = launch.rendezvous
    given = " ".join(part for part in (rendezvous.launcher_args, arguments) if part)
    found = (
        f"--hostfile={launch.folder / HOSTFILE}",
        f"--master_addr={launch.meeting}",
        f"--master_port={rendezvous.master_port}",
        f"--launcher={rendezvous.launcher}",
        *((f"--launcher_args={given}",) if given else ()),
        "--force_multi",
        "--no_ssh_check",  # every host was checked before
        "--log_level=error",
    )
    return (sys.executable, "-m", "deepspeed.launcher.runner", *found, *options)


def _pdsh(launch: Launch) -> tuple[str, ...]:
    hosts = launch.machines.hosts
    _require_bare_paths()
    options: tuple[str, ...] = ("--no_local_rank", "--module")
    if any("@" in host for host in hosts):  # the runner would read the @ as the end of a host
        launch.require_full_hosts("choose whole hosts, or name the user in ~/.ssh/config instead of the hostfile")
    else:
        chosen = (f"{host}:{','.join(str(slot) for slot in slots)}" for host, slots in hosts.items())
        options = (f"--include={'@'.join(chosen)}", *options)
    return (*_runner(launch, *options), RANK_MODULE, *(quote_for_pdsh(word) for word in launch.rank))


def _require_bare_paths() -> None:
    """Raises ConfigError where a shell would change a path that DeepSpeed's runner writes bare into its command.

    The shell of a host would stay in the home folder, and read and write relative paths of the configuration there.
    """
    paths = {"the working folder": str(Path.cwd()), "the interpreter": sys.executable, "the checkout": str(CHECKOUT)}
    hint = "use a path of letters, digits and any of /_-+=.,:@, or another launcher than pdsh"
    ConfigError.raise_any(
        ConfigIssue(
            f"the path of {what} holds {found.group()!r}, which the shells of hosts behind pdsh would change",
            location=path,
            hint=hint,
        )
        for what, path in paths.items()
        if (found := _CHANGED_BY_SHELLS.search(path))
    )


def quote_for_pdsh(word: str) -> str:
    """Returns a word that the shell of a host behind pdsh reads as the given one.

    DeepSpeed's runner puts a word that holds a blank into double quotes, in which the shell still replaces variables,
    and hands on every other word bare. pdsh itself replaces %h, %u and %n in every word, and %% by %.
    """
    word = word.replace("%", "%%")
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word)
    return shlex.quote(word)


def _mpi(launch: Launch) -> tuple[str, ...]:
    """OpenMPI. The workers do not use MPI, so the network of its own messages does not matter.

    The rank agent is named as a file: with a module DeepSpeed's runner for MPICH starts its own helper instead.
    """
    return (*_runner(launch), str(RANK_FILE), *launch.rank)


def _uniform_mpi(launch: Launch) -> tuple[str, ...]:
    """MPICH, Intel MPI and MVAPICH, which need the same number of ranks on every host."""
    assert launch.slots
    return _mpi(launch)


def _slurm(launch: Launch) -> tuple[str, ...]:
    """Srun. DeepSpeed's runner for it supports no modules, so the rank agent is named as a file."""
    options = [f"--ntasks-per-node={launch.slots}", f"--nodes={len(launch.machines.hosts)}"]
    if launch.machines.named:
        options.append(f"--nodelist={','.join(launch.addresses)}")
    options += [f"--{name}={value}" for name in ("comment", "account") if (value := getattr(launch.rendezvous, name))]
    if launch.machines.accelerator == "cuda" and "--gpus" not in launch.rendezvous.launcher_args:
        options.append(f"--gpus-per-node={launch.slots}")
    arguments = " ".join(shlex.quote(option) for option in options)
    return (*_runner(launch, arguments=arguments), str(RANK_FILE), *launch.rank)


def _jsrun(launch: Launch) -> tuple[str, ...]:
    """IBM's jsrun under LSF: a resource set is one host."""
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
    named = (f"--requires=host:{','.join(launch.addresses)}",) if launch.machines.named else ()
    return (
        *("flux", "run", "--nodes", str(hosts), "--tasks-per-node", str(slots), *gpus, "--exclusive"),
        *("-o", "mpi=none", "-o", "cpu-affinity=off", *named),
        *shlex.split(launch.rendezvous.launcher_args),
        *(sys.executable, "-u", str(RANK_FILE), *launch.rank),
    )


LAUNCHERS: Mapping[str, Callable[[Launch], tuple[str, ...]]] = {
    "pdsh": _pdsh,
    "openmpi": _mpi,
    "mpich": _uniform_mpi,
    "impi": _uniform_mpi,
    "mvapich": _uniform_mpi,
    "slurm": _slurm,
    "jsrun": _jsrun,
    "flux": _flux,
}
"""Launcher -> function of a Launch that returns the argv of all ranks."""

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
"""Launcher -> programs that must be installed on this host."""

OVER_SSH = frozenset(("pdsh", "openmpi", "mpich", "impi", "mvapich"))
"""Launchers that reach other hosts by ssh by default."""
