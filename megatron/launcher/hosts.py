"""Hosts and devices of the ranks: a hostfile, the accelerators of this host, or processes on its CPUs.

Order: a hostfile (the key, then the environment's DLTS_HOSTFILE, then /job/hostfile), the scheduler where launcher
names one, the local accelerators, CPU processes. Accelerators are counted from device files and environment variables,
since asking torch costs seconds. `global_num_gpus` states the size of the world; without a hostfile that is also a way
to plan a run for a cluster from a laptop.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from megatron.errors import ConfigError
from megatron.launcher.rank_env import expand_hosts

SCHEDULERS = frozenset(("slurm", "jsrun", "flux"))
"""Launchers that find the hosts of a job themselves."""
DEFAULT_HOSTFILE = "/job/hostfile"
LOCAL = "localhost"
PROCESSES_PER_CORE = 4  # limit of CPU ranks per core
Accelerator = Literal["cuda", "cpu"]
Slots = dict[str, tuple[int | str, ...]]


@dataclass(frozen=True)
class Hosts:
    """Hosts of a run."""

    hosts: Slots
    """Host -> device numbers or names, one rank each, in rank order."""
    accelerator: Accelerator
    """Device of each rank."""
    world_size: int
    """Planned number of ranks; differs from the number of slots only if the run cannot start here."""
    shortage: str | None = None
    """The reason why the run cannot start here; None if it can."""
    named: bool = True
    """Whether the names are known; a scheduler may choose them later."""

    @property
    def is_local(self) -> bool:
        return all(host in local_names() for host in self.hosts)


@dataclass(frozen=True)
class HostSelection:
    """Keys of the launch section that select hosts, see `megatron.config.schema.launch`."""

    hostfile: str | None = None
    """File of `host slots=N` lines."""
    include: str | None = None
    """Hosts and slots to use."""
    exclude: str | None = None
    """Hosts and slots to leave out."""
    num_nodes: int = -1
    """Number of hosts; -1 for all."""
    num_gpus: int | None = None
    """Ranks on each host."""
    global_num_gpus: int | None = None
    """Ranks of the run."""
    launcher: str = "pdsh"
    """Name of the launcher."""


def find_hosts(selection: HostSelection, environment: Mapping[str, str], devices: Path = Path("/dev")) -> Hosts:
    """Finds the hosts of a run. Raises ConfigError for a missing or wrong hostfile and for missing slots."""
    path = hostfile_in_use(selection, environment)
    if path is not None:
        return _select_hosts(
            f"the hostfile {path}", _number_slots(read_hostfile(path)), selection, environment, devices
        )
    if selection.launcher in SCHEDULERS:
        return _scheduler_hosts(selection, environment, devices)
    if selection.launcher == "torchrun" and selection.num_nodes > 1:
        here = _local_hosts(replace(selection, num_nodes=-1, global_num_gpus=None), environment, devices)
        hosts = {f"node-{number}": here.hosts[LOCAL] for number in range(selection.num_nodes)}
        ranks = sum(len(slots) for slots in hosts.values())
        return Hosts(hosts, here.accelerator, ranks, here.shortage, named=False)
    return _local_hosts(selection, environment, devices)


def _number_slots(counts: Mapping[str, int]) -> Slots:
    return {host: tuple(range(count)) for host, count in counts.items()}


def _select_hosts(
    source: str, hosts: Slots, selection: HostSelection, environment: Mapping[str, str], devices: Path
) -> Hosts:
    """Applies the keys to the hosts of `source`."""
    hosts = select_slots(hosts, selection)
    if selection.num_nodes > len(hosts):
        raise ConfigError.of(
            f"{source} offers {len(hosts)} hosts",
            key="num_nodes",
            value=selection.num_nodes,
            hint="add hosts or ask for fewer",
        )
    if selection.num_nodes > 0:
        hosts = dict(list(hosts.items())[: selection.num_nodes])
    if selection.num_gpus is not None and selection.num_gpus > 0:
        hosts = {host: _first_slots(slots, selection.num_gpus, host) for host, slots in hosts.items()}
    ranks = sum(len(slots) for slots in hosts.values())
    if selection.global_num_gpus is not None and selection.global_num_gpus != ranks:
        raise ConfigError.of(
            f"{source} gives {ranks} ranks",
            key="global_num_gpus",
            value=selection.global_num_gpus,
            hint="leave the key out, or choose hosts with include, exclude, num_nodes and num_gpus",
        )
    return Hosts(hosts, _accelerator_of(hosts, environment, devices), ranks)


def _scheduler_hosts(selection: HostSelection, environment: Mapping[str, str], devices: Path) -> Hosts:
    """Returns the hosts of a scheduler's allocation; outside of one, num_nodes hosts without known names."""
    counts = slurm_allocation(environment) if selection.launcher == "slurm" else {}
    if counts:
        if selection.num_gpus is not None and selection.num_gpus > 0:
            counts = dict.fromkeys(counts, selection.num_gpus)
        return _select_hosts("the allocation", _number_slots(counts), selection, environment, devices)
    if selection.num_nodes > 0 and selection.num_gpus is not None and selection.num_gpus > 0:
        hosts = _number_slots({f"node-{number}": selection.num_gpus for number in range(selection.num_nodes)})
        accelerator = _accelerator_of(hosts, environment, devices)
        return Hosts(hosts, accelerator, selection.num_nodes * selection.num_gpus, named=False)
    plan = _local_hosts(selection, environment, devices)
    hint = "give num_nodes and num_gpus, or hostfile" + (", or use sbatch" if selection.launcher == "slurm" else "")
    return replace(plan, shortage=f"the hosts for {selection.launcher} are not known; {hint}")


def slurm_allocation(environment: Mapping[str, str]) -> dict[str, int]:
    """Returns the hosts of Slurm's allocation with their ranks; {} outside of one.

    The ranks are those of --ntasks-per-node, else the GPUs of the host for the job, else Slurm's count of tasks.
    """
    hosts = list(expand_hosts(environment.get("SLURM_JOB_NODELIST", "")))
    if not hosts:
        return {}
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        if environment.get(name, "").isdecimal():
            return dict.fromkeys(hosts, int(environment[name]))
    counts: list[int] = []
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", environment.get("SLURM_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    return dict(zip(hosts, counts or [1] * len(hosts), strict=False))


def _accelerator_of(hosts: Slots, environment: Mapping[str, str], devices: Path) -> Accelerator:
    """Returns the accelerator: DS_ACCELERATOR, else that of this host; other hosts are assumed to have GPUs."""
    if environment.get("DS_ACCELERATOR"):
        return "cpu" if environment["DS_ACCELERATOR"] == "cpu" else "cuda"
    here = all(without_user(host) in local_names() for host in hosts)
    return "cuda" if not here or local_devices(environment, devices) else "cpu"


def hostfile_in_use(selection: HostSelection, environment: Mapping[str, str]) -> Path | None:
    """Returns the hostfile to use, or None. Raises ConfigError when the given one does not exist."""
    if selection.launcher == "local" and selection.hostfile is None:
        return None
    if selection.hostfile is not None:
        path = Path(selection.hostfile)
        # The public configurations name the default even where it does not exist.
        if not path.is_file() and selection.hostfile != DEFAULT_HOSTFILE:
            raise ConfigError.of("there is no such file", key="hostfile", value=selection.hostfile)
        return path if path.is_file() else None
    for name in (environment.get("DLTS_HOSTFILE"), DEFAULT_HOSTFILE):
        if name and Path(name).is_file():
            return Path(name)
    return None


def _text_of(path: Path) -> str:
    """Returns the text of a hostfile. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError.of(
            "it is not UTF-8",
            key="hostfile",
            value=str(path),
            hint="save the hostfile as UTF-8; Windows often writes UTF-16",
        ) from error


def read_hostfile(path: Path) -> dict[str, int]:
    """Parses lines of `host slots=N` or `user@host slots=N`; # starts a comment.

    Raises ConfigError with the line for anything else.
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", entry)
        location = f"{path}:{number}"
        if found is None or int(found[2]) == 0:
            raise ConfigError.of(f"this is not `host slots=N`: {entry}", key="hostfile", location=location)
        if found[1] in hosts:
            raise ConfigError.of(f"the host {found[1]} is listed twice", key="hostfile", location=location)
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError.of("no host in it", key="hostfile", value=str(path), hint="write `host slots=N` lines")
    return hosts


def select_slots(hosts: Slots, selection: HostSelection) -> Slots:
    """Applies include or exclude, `host:0,2@host2`: some slots of a host, or all of them."""
    if selection.include and selection.exclude:
        raise ConfigError.of("include and exclude cannot both be given", key="include", value=selection.include)
    key, text = ("include", selection.include) if selection.include else ("exclude", selection.exclude)
    if not text:
        return hosts
    named: dict[str, set[int | str]] = {}
    for part in _parts(text, hosts):
        host, _, listed = part.partition(":")
        if host not in hosts:
            raise ConfigError.of(
                f"there is no host {host}", key=key, value=text, hint=f"the hosts are {', '.join(hosts)}"
            )
        slots = {int(slot) if slot.isdecimal() else slot for slot in listed.split(",")} if listed else set(hosts[host])
        missing = slots - set(hosts[host])
        if missing:
            listed = ", ".join(str(slot) for slot in sorted(missing, key=str))
            raise ConfigError.of(f"{host} has no slot {listed}", key=key, value=text)
        named.setdefault(host, set()).update(slots)
    keep = selection.include is not None and bool(selection.include)
    chosen = {
        host: tuple(slot for slot in slots if (slot in named.get(host, ())) == keep) for host, slots in hosts.items()
    }
    chosen = {host: slots for host, slots in chosen.items() if slots}
    if not chosen:
        raise ConfigError.of("no slot is left", key=key, value=text)
    return chosen


def _parts(text: str, hosts: Slots) -> Iterator[str]:
    """The hosts of a selection, each with its slots; the @ between user and host of a hostfile's host parts nothing."""
    pieces = text.split("@")
    while pieces:
        host = "@".join(pieces[:2]).partition(":")[0]
        taken = 2 if "@" in host and host in hosts else 1
        yield "@".join(pieces[:taken])
        del pieces[:taken]


def without_user(host: str) -> str:
    """Returns the address of a hostfile's `user@host`."""
    return host.rpartition("@")[2]


def _first_slots(slots: tuple[int | str, ...], count: int, host: str) -> tuple[int | str, ...]:
    if count > len(slots):
        raise ConfigError.of(f"{host} has {len(slots)} slots", key="num_gpus", value=count)
    return slots[:count]


def _local_hosts(selection: HostSelection, environment: Mapping[str, str], devices: Path) -> Hosts:
    if selection.num_nodes > 1:
        raise ConfigError.of(
            "more than one host needs a hostfile", key="num_nodes", value=selection.num_nodes, hint="give hostfile"
        )
    found = local_devices(environment, devices)
    accelerator: Accelerator = "cuda" if found else "cpu"
    slots = select_slots({LOCAL: found}, selection)[LOCAL] if found else ()
    if (selection.include or selection.exclude) and not found:
        key, value = ("include", selection.include) if selection.include else ("exclude", selection.exclude)
        what = "this machine has no accelerators to choose from"
        raise ConfigError.of(what, key=key, value=value, hint="leave it out, or give hostfile; num_gpus sets the ranks")
    requested = selection.global_num_gpus or (
        selection.num_gpus if selection.num_gpus and selection.num_gpus > 0 else None
    )
    if accelerator == "cuda":
        world_size, available = requested or len(slots), len(slots)
        shortage = f"this machine offers {available} accelerators"
    else:
        world_size, available = requested or 1, PROCESSES_PER_CORE * core_count()
        slots = tuple(range(min(world_size, available)))
        shortage = f"this machine has no accelerator, and {core_count()} CPU cores cannot carry so many processes"
    if world_size <= available:
        return Hosts({LOCAL: slots[:world_size]}, accelerator, world_size)
    shortage = f"the run wants {world_size} ranks: {shortage}; name the hosts in a hostfile"
    return Hosts({LOCAL: slots}, accelerator, world_size, shortage)


def local_devices(environment: Mapping[str, str], devices: Path = Path("/dev")) -> tuple[int | str, ...]:
    """Returns the accelerators that this process may use, from CUDA_VISIBLE_DEVICES or /dev/nvidia<N>.

    () without accelerators, for DS_ACCELERATOR=cpu, and for a CPU build of torch.
    """
    if environment.get("DS_ACCELERATOR", "cuda") != "cuda" or _torch_is_for_cpus():
        return ()
    present = [path.name for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if not present:
        return ()
    if visible is None:
        return tuple(range(len(present)))
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return tuple(int(name) if name.isdecimal() else name for name in names if name != "-1")


def _torch_is_for_cpus() -> bool:
    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def core_count() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def local_names() -> frozenset[str]:
    """Returns the names of this host in a hostfile."""
    name = socket.gethostname()
    return frozenset({LOCAL, "127.0.0.1", "::1", name, name.partition(".")[0]})
