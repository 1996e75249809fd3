"""Request -> Config: the machines are found once the launch keys are known, then everything else is resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.config import Resolution, Resources, resolve
from megatron.config.schema.launch import LaunchSection
from megatron.errors import ConfigError, ConfigIssue
from megatron.launcher.arguments import Request
from megatron.launcher.hosts import Hosts, Wanted, find_machines


@dataclass(frozen=True)
class Resolved:
    """What a request means on these machines."""

    resolution: Resolution
    machines: Hosts


def resolve_request(request: Request, environment: Mapping[str, str]) -> Resolved:
    """Finds the machines and resolves the configuration for them. Raises ConfigError with every error."""
    found: list[Hosts] = []

    def resources(launch: LaunchSection) -> Resources:
        machines = find_machines(wanted_machines(launch), environment)
        found.append(machines)
        hosts = tuple((host, len(slots)) for host, slots in machines.hosts.items())
        return Resources(machines.world_size, machines.accelerator, hosts)

    resolution = resolve(request.files, request.flags, resources, request.issues)
    return Resolved(resolution, found[0])


def wanted_machines(launch: LaunchSection) -> Wanted:
    """The launch keys that choose machines."""
    return Wanted(
        hostfile=launch.hostfile,
        include=launch.include or None,
        exclude=launch.exclude or None,
        num_nodes=launch.num_nodes,
        num_gpus=launch.num_gpus,
        global_num_gpus=launch.global_num_gpus,
        launcher=launcher_of(launch),
    )


def launcher_of(launch: LaunchSection) -> str:
    """The launcher that the keys ask for; deepspeed_slurm and deepspeed_mpi are other ways to name one."""
    if launch.deepspeed_slurm:
        return "slurm"
    return "openmpi" if launch.deepspeed_mpi and launch.launcher == "pdsh" else launch.launcher


def refuse_unsupported(resolution: Resolution) -> None:
    """Raises ConfigError where the configuration asks for a feature that is not built."""
    ConfigError.raise_any(ConfigIssue(line, hint="leave it out") for line in resolution.not_supported_yet)
