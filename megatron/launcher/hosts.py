"""Where the ranks run: a hostfile, the accelerators of this machine, or processes on its CPUs.

Order: a hostfile (the key, then the environment's DLTS_HOSTFILE, then /job/hostfile), the scheduler where launcher
names one, the local accelerators, CPU processes. Accelerators are counted from device files and environment variables,
since asking torch costs seconds. `global_num_gpus` states the size of the world; without a hostfile that is also a way
to plan a run for a cluster from a laptop.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from megatron.errors import ConfigError
from megatron.launcher.rank_env import expand_hosts

SCHEDULERS = frozenset(("slurm", "jsrun", "flux"))
"""Launchers that know the hosts of a job by themselves."""
DEFAULT_HOSTFILE = "/job/hostfile"
LOCAL = "localhost"
PROCESSES_PER_CORE = 4  # more CPU ranks than this a core would only stop the machine
Accelerator = Literal["cuda", "cpu"]
Slots = dict[str, tuple[int | str, ...]]


@dataclass(frozen=True)
class Hosts:
    """hosts: host -> device numbers (or names), one rank each, in rank order. accelerator: "cuda" or "cpu".

    world_size: what the run is planned for; it differs from the number of slots only in a plan that cannot start here.
    shortage: why it cannot start here, else None. named: the hosts' names are known; a scheduler may choose them later.
    """

    hosts: Slots
    accelerator: Accelerator
    world_size: int
    shortage: str | None = None
    named: bool = True

    @property
    def is_local(self) -> bool:
        return all(host in local_names() for host in self.hosts)


@dataclass(frozen=True)
class Wanted:
    """The keys that say where to run, as the user gave them."""

    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    num_nodes: int = -1
    num_gpus: int | None = None
    global_num_gpus: int | None = None
    launcher: str = "pdsh"


def find_machines(wanted: Wanted, environment: Mapping[str, str], devices: Path = Path("/dev")) -> Hosts:
    """The machines of a run. Raises ConfigError for a missing or wrong hostfile and for slots that are not there."""
    path = hostfile_in_use(wanted, environment)
    if path is not None:
        return _chosen(f"the hostfile {path}", _numbered(read_hostfile(path)), wanted, environment, devices)
    if wanted.launcher in SCHEDULERS:
        return _from_scheduler(wanted, environment, devices)
    if wanted.launcher == "torchrun" and wanted.num_nodes > 1:
        here = _on_this_machine(replace(wanted, num_nodes=-1, global_num_gpus=None), environment, devices)
        hosts = {f"node-{number}": here.hosts[LOCAL] for number in range(wanted.num_nodes)}
        ranks = sum(len(slots) for slots in hosts.values())
        return Hosts(hosts, here.accelerator, ranks, here.shortage, named=False)
    return _on_this_machine(wanted, environment, devices)


def _numbered(counts: Mapping[str, int]) -> Slots:
    return {host: tuple(range(count)) for host, count in counts.items()}


def _chosen(source: str, hosts: Slots, wanted: Wanted, environment: Mapping[str, str], devices: Path) -> Hosts:
    """What the keys choose of the hosts that `source` offers."""
    hosts = select_slots(hosts, wanted)
    if wanted.num_nodes > len(hosts):
        raise ConfigError.of(
            f"{source} offers {len(hosts)} hosts",
            key="num_nodes",
            value=wanted.num_nodes,
            hint="add hosts or ask for fewer",
        )
    if wanted.num_nodes > 0:
        hosts = dict(list(hosts.items())[: wanted.num_nodes])
    if wanted.num_gpus is not None and wanted.num_gpus > 0:
        hosts = {host: _first(slots, wanted.num_gpus, host) for host, slots in hosts.items()}
    ranks = sum(len(slots) for slots in hosts.values())
    if wanted.global_num_gpus is not None and wanted.global_num_gpus != ranks:
        raise ConfigError.of(
            f"{source} gives {ranks} ranks",
            key="global_num_gpus",
            value=wanted.global_num_gpus,
            hint="leave the key out, or choose hosts with include, exclude, num_nodes and num_gpus",
        )
    return Hosts(hosts, _accelerator_of(hosts, environment, devices), ranks)


def _from_scheduler(wanted: Wanted, environment: Mapping[str, str], devices: Path) -> Hosts:
    """The hosts of a scheduler's allocation; outside of one, as many as num_nodes says, whose names are not known."""
    counts = allocated(environment) if wanted.launcher == "slurm" else {}
    if counts:
        if wanted.num_gpus is not None and wanted.num_gpus > 0:
            counts = dict.fromkeys(counts, wanted.num_gpus)
        return _chosen("the allocation", _numbered(counts), wanted, environment, devices)
    if wanted.num_nodes > 0 and wanted.num_gpus is not None and wanted.num_gpus > 0:
        hosts = _numbered({f"node-{number}": wanted.num_gpus for number in range(wanted.num_nodes)})
        accelerator = _accelerator_of(hosts, environment, devices)
        return Hosts(hosts, accelerator, wanted.num_nodes * wanted.num_gpus, named=False)
    plan = _on_this_machine(wanted, environment, devices)
    hint = "give num_nodes and num_gpus, or hostfile" + (", or use sbatch" if wanted.launcher == "slurm" else "")
    return replace(plan, shortage=f"nothing tells {wanted.launcher} which hosts to use; {hint}")


def allocated(environment: Mapping[str, str]) -> dict[str, int]:
    """The hosts of Slurm's allocation and the ranks for each; {} outside of one.

    As many as --ntasks-per-node asked for, else as the host has GPUs for the job, else as Slurm counts tasks.
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
    """Other hosts are believed to have accelerators, unless DS_ACCELERATOR says what they have."""
    if environment.get("DS_ACCELERATOR"):
        return "cpu" if environment["DS_ACCELERATOR"] == "cpu" else "cuda"
    here = all(host in local_names() for host in hosts)
    return "cuda" if not here or local_devices(environment, devices) else "cpu"


def hostfile_in_use(wanted: Wanted, environment: Mapping[str, str]) -> Path | None:
    """The hostfile that decides, if one does. Raises ConfigError where the one that is named does not exist."""
    if wanted.launcher == "local" and wanted.hostfile is None:
        return None
    if wanted.hostfile is not None:
        path = Path(wanted.hostfile)
        # The public configurations name the default even where it does not exist.
        if not path.is_file() and wanted.hostfile != DEFAULT_HOSTFILE:
            raise ConfigError.of("there is no such file", key="hostfile", value=wanted.hostfile)
        return path if path.is_file() else None
    for name in (environment.get("DLTS_HOSTFILE"), DEFAULT_HOSTFILE):
        if name and Path(name).is_file():
            return Path(name)
    return None


def read_hostfile(path: Path) -> dict[str, int]:
    """Reads `host slots=N` lines; # starts a comment. Raises ConfigError with the line for anything else."""
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", entry)
        location = f"{path}:{number}"
        if found is None or int(found[2]) == 0:
            raise ConfigError.of(f"this is not `host slots=N`: {entry}", key="hostfile", location=location)
        if found[1] in hosts:
            raise ConfigError.of(f"the host {found[1]} stands here a second time", key="hostfile", location=location)
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ConfigError.of("no host in it", key="hostfile", value=str(path), hint="write `host slots=N` lines")
    return hosts


def select_slots(hosts: Slots, wanted: Wanted) -> Slots:
    """Applies include or exclude, `host:0,2@host2`: slots of a host, or all of them."""
    if wanted.include and wanted.exclude:
        raise ConfigError.of("include and exclude cannot both be given", key="include", value=wanted.include)
    key, text = ("include", wanted.include) if wanted.include else ("exclude", wanted.exclude)
    if not text:
        return hosts
    named: dict[str, set[int | str]] = {}
    for part in text.split("@"):
        host, _, listed = part.partition(":")
        if host not in hosts:
            raise ConfigError.of(
                f"there is no host {host}", key=key, value=text, hint=f"the hosts are {', '.join(hosts)}"
            )
        slots = {int(slot) if slot.isdecimal() else slot for slot in listed.split(",")} if listed else set(hosts[host])
        missing = slots - set(hosts[host])
        if missing:
            told = ", ".join(str(slot) for slot in sorted(missing, key=str))
            raise ConfigError.of(f"{host} has no slot {told}", key=key, value=text)
        named.setdefault(host, set()).update(slots)
    keep = wanted.include is not None and bool(wanted.include)
    chosen = {
        host: tuple(slot for slot in slots if (slot in named.get(host, ())) == keep) for host, slots in hosts.items()
    }
    chosen = {host: slots for host, slots in chosen.items() if slots}
    if not chosen:
        raise ConfigError.of("no slot is left", key=key, value=text)
    return chosen


def _first(slots: tuple[int | str, ...], count: int, host: str) -> tuple[int | str, ...]:
    if count > len(slots):
        raise ConfigError.of(f"{host} has {len(slots)} slots", key="num_gpus", value=count)
    return slots[:count]


def _on_this_machine(wanted: Wanted, environment: Mapping[str, str], devices: Path) -> Hosts:
    if wanted.num_nodes > 1:
        raise ConfigError.of(
            "more than one host needs a hostfile", key="num_nodes", value=wanted.num_nodes, hint="give hostfile"
        )
    found = local_devices(environment, devices)
    accelerator: Accelerator = "cuda" if found else "cpu"
    slots = select_slots({LOCAL: found}, wanted)[LOCAL] if found else ()
    if (wanted.include or wanted.exclude) and not found:
        key, value = ("include", wanted.include) if wanted.include else ("exclude", wanted.exclude)
        what = "this machine has no accelerators to choose from"
        raise ConfigError.of(what, key=key, value=value, hint="leave it out, or give hostfile; num_gpus sets the ranks")
    asked = wanted.global_num_gpus or (wanted.num_gpus if wanted.num_gpus and wanted.num_gpus > 0 else None)
    if accelerator == "cuda":
        world_size, available = asked or len(slots), len(slots)
        shortage = f"this machine offers {available} accelerators"
    else:
        world_size, available = asked or 1, PROCESSES_PER_CORE * core_count()
        slots = tuple(range(min(world_size, available)))
        shortage = f"this machine has no accelerator, and {core_count()} CPU cores cannot carry so many processes"
    if world_size <= available:
        return Hosts({LOCAL: slots[:world_size]}, accelerator, world_size)
    shortage = f"the run wants {world_size} ranks: {shortage}; name the hosts in a hostfile"
    return Hosts({LOCAL: slots}, accelerator, world_size, shortage)


def local_devices(environment: Mapping[str, str], devices: Path = Path("/dev")) -> tuple[int | str, ...]:
    """The accelerators that this process may use, from CUDA_VISIBLE_DEVICES or /dev/nvidia<N>; () where there are none.

    There are none for DS_ACCELERATOR=cpu and for a torch that was built for CPUs only.
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
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def local_names() -> frozenset[str]:
    """Names under which this host may be in a hostfile."""
    name = socket.gethostname()
    return frozenset({LOCAL, "127.0.0.1", "::1", name, name.partition(".")[0]})
