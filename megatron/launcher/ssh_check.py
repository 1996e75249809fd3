"""Checks that the launcher is installed and that all hosts accept ssh, before anything starts."""

from __future__ import annotations

import ipaddress
import shlex
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from megatron.errors import ConfigError, ConfigIssue
from megatron.launcher.commands.multi_host import OVER_SSH, PROGRAMS
from megatron.launcher.hosts import without_user

PROBE_SECONDS = 10.0  # for a host to answer
MAX_THREADS = 32
TEST_ADDRESS = "192.0.2.1"  # reserved for documentation by RFC 5737
INSTALLED_BY = {"pdsh": "apt install pdsh", "slurm": "apt install slurm-client", "openmpi": "apt install openmpi-bin"}


@dataclass(frozen=True)
class SshResult:
    """Result of one ssh check."""

    host: str
    """The host."""
    error: str | None = None
    """The reason why it cannot be used; None if it can."""
    address: str | None = None
    """Its first address; None where it does not say."""


def check_launcher(launcher: str, environment: Mapping[str, str]) -> None:
    """Raises ConfigError when the launcher's programs are not installed on this host."""
    missing = [name for name in PROGRAMS.get(launcher, ()) if shutil.which(name, path=environment.get("PATH")) is None]
    if missing:
        how = f"install it ({INSTALLED_BY[launcher]})" if launcher in INSTALLED_BY else "install it"
        raise ConfigError.of(
            f"there is no {' and no '.join(missing)} on this host",
            key="launcher",
            value=launcher,
            hint=f"{how}, or name another launcher",
        )


def check_hosts(launcher: str, hosts: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Checks every host by ssh; returns the first one's address. Raises ConfigError with all failures."""
    if launcher not in OVER_SSH:
        return None
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        answers = list(pool.map(lambda host: check_ssh(host, environment), hosts))
    hint = "repair it, leave the host out with exclude, or set no_ssh_check where the launcher needs no ssh"
    ConfigError.raise_any(
        ConfigIssue(f"the host cannot be reached by ssh: {answer.error}", key="hostfile", value=answer.host, hint=hint)
        for answer in answers
        if answer.error is not None
    )
    return answers[0].address


def check_ssh(host: str, environment: Mapping[str, str]) -> SshResult:
    """Checks whether a host accepts ssh without a password within PROBE_SECONDS."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={PROBE_SECONDS:.0f}"]
    options += shlex.split(environment.get("PDSH_SSH_ARGS_APPEND", ""))
    try:
        done = subprocess.run(
            ["ssh", *options, host, "hostname -I"],
            capture_output=True,
            text=True,
            timeout=2 * PROBE_SECONDS,
            check=False,
            env=dict(environment),
        )
    except OSError as error:
        return SshResult(host, f"there is no ssh on this host: {error.strerror}")
    except subprocess.TimeoutExpired:
        return SshResult(host, f"no answer within {2 * PROBE_SECONDS:.0f} seconds")
    if done.returncode == 255:  # ssh's own
        reported = done.stderr.strip().splitlines()
        return SshResult(host, reported[-1] if reported else "ssh gives no reason")
    return SshResult(host, address=None if done.returncode else _first_address(done.stdout))


def _first_address(text: str) -> str | None:
    """Returns the first address of the last line that holds addresses alone: a login shell may print more lines.

    Those that lead nowhere from another host are left out.
    """
    for line in reversed(text.splitlines()):
        try:
            addresses = [(word, ipaddress.ip_address(word)) for word in line.split()]
        except ValueError:
            continue
        usable = [word for word, each in addresses if not (each.is_loopback or each.is_link_local)]
        if usable:
            return usable[0]
    return None


def own_address(remote: str | None) -> str:
    """Returns the address of this host in the network of a remote host, or of the default route; else its name."""
    for other in (remote, TEST_ADDRESS):
        found = _source_address(other) if other is not None else None
        if found is not None and not found.startswith("127."):
            return found
    return socket.gethostname()


def _source_address(remote: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((remote, 9))  # nothing is sent
        except OSError:
            return None
        return str(probe.getsockname()[0])


def node_number(hosts: Sequence[str], environment: Mapping[str, str], names: frozenset[str]) -> int:
    """Returns the number of this host, for launchers that run on each host. Raises ConfigError if unknown."""
    for name in ("NODE_RANK", "PET_NODE_RANK", "GROUP_RANK", "SLURM_NODEID"):
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    if len(hosts) == 1:
        return 0
    found = [number for number, host in enumerate(hosts) if without_user(host) in names]
    if len(found) != 1:
        message = f"the number of this host among the {len(hosts)} hosts is not known"
        raise ConfigError.of(
            message, key="NODE_RANK", location="environment", hint="set it to 0 on the first, and so on"
        )
    return found[0]
