"""Finds rank, world size and master address under any launcher, and sets the variables of torch.distributed.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set by DeepSpeed's launcher, torchrun and Kubernetes'
operators. Slurm, the MPIs, jsrun and Flux use other names, and most of them do not set the address of rank 0.
Imports only the standard library, to keep start-up fast.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator, Mapping, MutableMapping

from megatron.errors import ConfigError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")

ALIASES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "OpenMPI": (("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",)),
    "MVAPICH": (
        ("MV2_COMM_WORLD_RANK", "MVP_COMM_WORLD_RANK"),
        ("MV2_COMM_WORLD_SIZE", "MVP_COMM_WORLD_SIZE"),
        ("MV2_COMM_WORLD_LOCAL_RANK", "MVP_COMM_WORLD_LOCAL_RANK"),
    ),
    "MPICH": (
        ("PMI_RANK", "PALS_RANKID"),
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
    ),
    "jsrun": (("JSM_NAMESPACE_RANK",), ("JSM_NAMESPACE_SIZE",), ("JSM_NAMESPACE_LOCAL_RANK",)),
    "Flux": (("FLUX_TASK_RANK",), ("FLUX_JOB_SIZE",), ("FLUX_TASK_LOCAL_ID",)),
    "PMIx": (("PMIX_RANK",), (), ()),
    "Slurm": (("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"), ("SLURM_LOCALID",)),
}
"""Launcher -> its variables of rank, world size and local rank, the first that is set counts; MPICH's relatives (Intel
MPI, PALS of HPE Cray) are in its line.

The MPIs come before the schedulers under which they may run, whose numbers are then those of their helpers.
"""

SINGLE_HOST_VARS = {
    "OMPI_COMM_WORLD_LOCAL_SIZE": None,
    "MV2_COMM_WORLD_LOCAL_SIZE": None,
    "MVP_COMM_WORLD_LOCAL_SIZE": None,
    "MPI_LOCALNRANKS": None,
    "PMI_LOCAL_SIZE": None,
    "PALS_LOCAL_SIZE": None,
    "JSM_NAMESPACE_LOCAL_SIZE": None,
    "SLURM_STEP_NUM_NODES": "1",
    "FLUX_JOB_NNODES": "1",
}
"""Variable -> its value when all ranks share a host; None for the world size."""

SHELL_STEPS = ("4294967290", "4294967291")
"""Numbers of Slurm's steps that are no tasks: the shell of salloc, and the batch script."""

JOB_IDS = ("SLURM_JOB_ID", "PMIX_NAMESPACE", "PMI_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "PBS_JOBID")
OUTER_PREFIXES = ("OMPI_", "PMI_", "PMIX_", "PALS_", "MV2_", "MVP_", "JSM_", "HYDRA_", "TORCHELASTIC_RUN_ID")
"""Prefixes of the variables that an MPI or torchrun sets for its processes."""
FIRST_PORT, PORTS = 20_000, 10_000


def set_rank_env(environment: MutableMapping[str, str]) -> None:
    """Sets the variables of torch.distributed. Raises ConfigError when the environment is contradictory."""
    if "RANK" not in environment:
        for name, alias in _launcher_variables(environment).items():
            environment.setdefault(name, environment[alias])
    rank_env = {name: _number_of(name, environment) for name in NAMES if name in environment}
    if "RANK" in rank_env and "WORLD_SIZE" not in rank_env:
        hint = "set WORLD_SIZE, the number of processes, as well"
        raise ConfigError.of("the environment has a RANK and no WORLD_SIZE", location="environment", hint=hint)
    size = rank_env.get("WORLD_SIZE", 1)
    if rank_env.get("RANK", 0) >= size:
        raise ConfigError.of(f"there are {size} ranks", key="RANK", value=rank_env["RANK"], location="environment")
    if size > 1:
        if "RANK" not in rank_env:
            found = f"WORLD_SIZE = {size} and no RANK"
            raise ConfigError.of(
                f"the environment has {found}", location="environment", hint="set RANK for each process"
            )
        environment.setdefault("LOCAL_RANK", "0")
        _set_master(environment, size)
        port = environment["MASTER_PORT"]
        if not port.isdecimal():
            hint = "set it to the same free port for all; a Kubernetes service named master sets it to an address"
            raise ConfigError.of("this is no port", key="MASTER_PORT", value=port, location="environment", hint=hint)
    elif not environment.get("MASTER_PORT", "0").isdecimal():
        del environment["MASTER_PORT"]  # a process that is alone chooses a free one


def without_rank_env(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment without rank variables of an outer job or a login profile."""
    aliases = {name for variables in ALIASES.values() for names in variables for name in names}
    ours = {*NAMES, "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", *SINGLE_HOST_VARS, *aliases}
    return {
        name: text for name, text in environment.items() if name not in ours and not name.startswith(OUTER_PREFIXES)
    }


def _launcher_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns RANK, WORLD_SIZE and LOCAL_RANK -> the launcher's variable for it, those that are set; {} without any.

    The first launcher that gives a rank counts; what it does not give is taken from others that agree with it.
    """
    found = [_variables_set(launcher, environment) for launcher in ALIASES]
    ranked = [names for names in found if "RANK" in names]
    if not ranked:
        _require_no_size(found, environment)
        return {}
    agreeing = [names for names in ranked if _agree(names, ranked[0], environment)]
    merged: dict[str, str] = {}
    for names in reversed(agreeing):
        merged |= names
    others = [names for names in ranked if len(names) == len(NAMES) and names not in agreeing]
    if "LOCAL_RANK" not in merged and others:
        first, other = (_describe(names, environment) for names in (ranked[0], others[0]))
        raise _error(
            f"the launchers disagree: {first}, but {other}", "unset those of the launcher that did not start this"
        )
    _require_size(merged, environment)
    return merged


def _require_size(names: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Raises ConfigError unless the launcher, or the user, gives one number of processes."""
    alone = f"or unset {names['RANK']} where this process is alone"
    given = environment.get("WORLD_SIZE")
    if "WORLD_SIZE" not in names:
        if given is None:
            sizes = next(sizes for ranks, sizes, _ in ALIASES.values() if names["RANK"] in ranks)
            missing = sizes[0] if sizes else "number of processes"
            hint = f"set WORLD_SIZE, the number of processes, as well, {alone}"
            raise _error(f"the environment has {_describe(names, environment)} and no {missing}", hint)
    elif given is not None and _number_of(names["WORLD_SIZE"], environment) != _number_of("WORLD_SIZE", environment):
        text = f"{_describe(names, environment)}, but WORLD_SIZE = {given}"
        raise _error(f"the environment has {text}", f"unset WORLD_SIZE, or set RANK as well, {alone}")


def _variables_set(launcher: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns RANK, WORLD_SIZE and LOCAL_RANK -> the launcher's variable for it, those that are set."""
    if launcher == "Slurm" and environment.get("SLURM_STEP_ID", SHELL_STEPS[0]) in SHELL_STEPS:
        return {}  # a batch script or the shell of a job is no task
    chosen = {
        name: next((one for one in variables if environment.get(one)), None)
        for name, variables in zip(NAMES, ALIASES[launcher], strict=True)
    }
    return {name: variable for name, variable in chosen.items() if variable is not None}


def _agree(names: Mapping[str, str], others: Mapping[str, str], environment: Mapping[str, str]) -> bool:
    both = [name for name in ("RANK", "WORLD_SIZE") if name in names and name in others]
    return all(_number_of(names[name], environment) == _number_of(others[name], environment) for name in both)


def _require_no_size(found: Iterable[Mapping[str, str]], environment: Mapping[str, str]) -> None:
    for names in found:
        size = names.get("WORLD_SIZE")
        if size is not None and _number_of(size, environment) > 1:
            rank = next(ranks[0] for ranks, sizes, _ in ALIASES.values() if size in sizes)
            hint = f"set RANK for each process, or unset {size} where this process is alone"
            raise _error(f"the environment has {size} = {environment[size]} and no {rank}", hint)


def _describe(names: Mapping[str, str], environment: Mapping[str, str]) -> str:
    shown = [names[name] for name in ("RANK", "WORLD_SIZE") if name in names]
    return " and ".join(f"{name} = {environment[name]}" for name in shown)


def _error(message: str, hint: str) -> ConfigError:
    return ConfigError.of(message, location="environment", hint=hint)


def _number_of(name: str, environment: Mapping[str, str]) -> int:
    text = environment[name]
    if not re.fullmatch(r"\d+", text):
        raise ConfigError.of("this is not a number", key=name, value=text, location="environment")
    return int(text)


def _set_master(environment: MutableMapping[str, str], size: int) -> None:
    """Sets MASTER_ADDR to rank 0's host, and MASTER_PORT to a port derived from the job id."""
    if "MASTER_ADDR" not in environment:
        alone = any(environment.get(name) == (value or str(size)) for name, value in SINGLE_HOST_VARS.items())
        found = "127.0.0.1" if alone else _first_host(environment)
        if found is None:
            raise ConfigError.of(
                f"the address of rank 0 is not known to the {size} ranks",
                key="MASTER_ADDR",
                location="environment",
                hint="set it to the address of rank 0's host, the same for all",
            )
        environment["MASTER_ADDR"] = found
    job = next((environment[name] for name in JOB_IDS if environment.get(name)), "0")
    digits = int("".join(re.findall(r"\d", job)) or 0) + int(environment.get("SLURM_STEP_ID") or 0)
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + digits % PORTS))


def _first_host(environment: Mapping[str, str]) -> str | None:
    """Returns rank 0's host by the scheduler's name; if that does not resolve, the host that called srun."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if hosts:
        first = next(iter(expand_hosts(hosts)))
        return first if _resolves(first) else environment.get("SLURM_LAUNCH_NODE_IPADDR") or first
    slots = (environment.get("LSB_MCPU_HOSTS") or "").split()[::2]
    if len(slots) > 1:
        return slots[1]  # the first is the host of the batch script
    return slots[0] if slots else None


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def expand_hosts(text: str) -> Iterator[str]:
    """Expands a host list of Slurm or Flux: `a[01-03,7]-ib,b` is a01-ib, a02-ib, a03-ib, a07-ib and b."""
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        yield from _expand(part.strip())


def _expand(part: str) -> Iterator[str]:
    found = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if found is None:
        yield part
        return
    before, ranges, after = found.groups()
    for one in ranges.split(","):
        first, _, last = one.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for rest in _expand(after):
                yield f"{before}{number:0{len(first)}d}{rest}"
