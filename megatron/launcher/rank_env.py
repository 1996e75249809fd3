"""Finds rank, world size and master address under any launcher, and sets the variables of torch.distributed.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set by DeepSpeed's launcher, torchrun and Kubernetes'
operators. Slurm, the MPIs, jsrun and Flux use other names, and most of them do not set the address of rank 0.
Imports only the standard library, to keep start-up fast.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping, MutableMapping

from megatron.errors import ConfigError

ALIASES: Mapping[str, tuple[str, str, str]] = {
    "OpenMPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
    "Flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}
"""Launcher -> its variables of rank, world size and local rank.

The MPIs come before the schedulers under which they may run, whose numbers are then those of their helpers.
"""

SINGLE_HOST_VARS = {
    "OMPI_COMM_WORLD_LOCAL_SIZE": None,
    "MV2_COMM_WORLD_LOCAL_SIZE": None,
    "MPI_LOCALNRANKS": None,
    "JSM_NAMESPACE_LOCAL_SIZE": None,
    "SLURM_STEP_NUM_NODES": "1",
    "FLUX_JOB_NNODES": "1",
}
"""Variable -> its value when all ranks share a host; None for the world size."""

JOB_IDS = ("SLURM_JOB_ID", "PMIX_NAMESPACE", "PMI_JOBID", "LSB_JOBID", "FLUX_JOB_ID")
OUTER_PREFIXES = ("OMPI_", "PMI_", "PMIX_", "MV2_", "JSM_", "HYDRA_", "TORCHELASTIC_RUN_ID")
"""Prefixes of the variables that an MPI or torchrun sets for its processes."""
FIRST_PORT, PORTS = 20_000, 10_000
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def set_rank_env(environment: MutableMapping[str, str]) -> None:
    """Sets the variables of torch.distributed. Raises ConfigError when the environment is contradictory."""
    if "RANK" not in environment:
        for names in _rank_variables(environment):
            for name, alias in zip(NAMES, names, strict=True):
                if environment.get(alias):
                    environment.setdefault(name, environment[alias])
            break
    rank_env = {name: _parse_number(name, environment[name]) for name in NAMES if name in environment}
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


def without_rank_env(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment without rank variables of an outer job or a login profile."""
    aliases = {name for names in ALIASES.values() for name in names}
    ours = {*NAMES, "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", *SINGLE_HOST_VARS, *aliases}
    return {
        name: text for name, text in environment.items() if name not in ours and not name.startswith(OUTER_PREFIXES)
    }


def _rank_variables(environment: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yields the rank variables of the launchers of this process; a Slurm batch script is no task."""
    for launcher, names in ALIASES.items():
        batch_script = launcher == "Slurm" and "SLURM_STEP_ID" not in environment
        if all(environment.get(name) for name in names) and not batch_script:
            yield names


def _parse_number(name: str, text: str) -> int:
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
