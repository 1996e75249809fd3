"""Resolves a command line: finds the hosts from the launch keys, then resolves the configuration for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.config import Resolution, Resources, resolve
from megatron.config.schema.launch import LaunchSection
from megatron.errors import ConfigError, ConfigIssue
from megatron.launcher.arguments import LaunchRequest
from megatron.launcher.hosts import Hosts, HostSelection, find_hosts


@dataclass(frozen=True)
class Resolved:
    """A resolved command line."""

    resolution: Resolution
    """The configuration and its origin."""
    machines: Hosts
    """The hosts of the run."""


def resolve_request(request: LaunchRequest, environment: Mapping[str, str]) -> Resolved:
    """Finds the hosts and resolves the configuration for them. Raises ConfigError with every error."""
    found: list[Hosts] = []

    def resources(launch: LaunchSection) -> Resources:
        machines = find_hosts(host_selection(launch), environment)
        found.append(machines)
        hosts = tuple((host, len(slots)) for host, slots in machines.hosts.items())
        return Resources(machines.world_size, machines.accelerator, hosts)

    resolution = resolve(request.files, request.flags, resources, request.issues)
    return Resolved(resolution, found[0])


def host_selection(launch: LaunchSection) -> HostSelection:
    """Returns the launch keys that select hosts."""
    return HostSelection(
        hostfile=launch.hostfile,
        include=launch.include or None,
        exclude=launch.exclude or None,
        num_nodes=launch.num_nodes,
        num_gpus=launch.num_gpus,
        global_num_gpus=launch.global_num_gpus,
        launcher=launcher_of(launch),
    )


def launcher_of(launch: LaunchSection) -> str:
    """Returns the launcher that the keys name; deepspeed_slurm and deepspeed_mpi name one too."""
    if launch.deepspeed_slurm:
        return "slurm"
    return "openmpi" if launch.deepspeed_mpi and launch.launcher == "pdsh" else launch.launcher


def refuse_unsupported(resolution: Resolution) -> None:
    """Raises ConfigError when the configuration requests a feature that is not built."""
    ConfigError.raise_any(ConfigIssue(line, hint="leave it out") for line in resolution.not_supported_yet)
