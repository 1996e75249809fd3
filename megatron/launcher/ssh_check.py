"""Whether the launcher is there and the hosts can be reached, asked of all of them before anything starts."""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from megatron.errors import ConfigError, ConfigIssue
from megatron.launcher.commands.multi_host import OVER_SSH, PROGRAMS

PROBE_SECONDS = 10.0  # for a host to answer
AT_ONCE = 32
ANYWHERE = "192.0.2.1"  # an address that RFC 5737 gives to nobody
INSTALLED_BY = {"pdsh": "apt install pdsh", "slurm": "apt install slurm-client", "openmpi": "apt install openmpi-bin"}


@dataclass(frozen=True)
class Answer:
    """What a host said. error: why it cannot be used, None where it can. address: its first one, None if unknown."""

    host: str
    error: str | None = None
    address: str | None = None


def check_launcher(launcher: str, environment: Mapping[str, str]) -> None:
    """Raises ConfigError where the launcher's own programs are not on this host."""
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
    """Asks every host over ssh; returns the first one's address. Raises ConfigError that names all that fail."""
    if launcher not in OVER_SSH:
        return None
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda host: ask(host, environment), hosts))
    hint = "mend it, leave the host out with exclude, or set no_ssh_check where the launcher needs no ssh"
    ConfigError.raise_any(
        ConfigIssue(f"the host cannot be reached by ssh: {answer.error}", key="hostfile", value=answer.host, hint=hint)
        for answer in answers
        if answer.error is not None
    )
    return answers[0].address


def ask(host: str, environment: Mapping[str, str]) -> Answer:
    """Whether a host lets this user in by ssh, without a password, within PROBE_SECONDS."""
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
        return Answer(host, f"there is no ssh on this host: {error.strerror}")
    except subprocess.TimeoutExpired:
        return Answer(host, f"no answer within {2 * PROBE_SECONDS:.0f} seconds")
    if done.returncode == 255:  # ssh's own
        said = done.stderr.strip().splitlines()
        return Answer(host, said[-1] if said else "ssh gives no reason")
    addresses = done.stdout.split()
    return Answer(host, address=addresses[0] if addresses else None)


def own_address(towards: str | None) -> str:
    """The address of this host in the network that leads to another one, or to anywhere; else its name."""
    for other in (towards, ANYWHERE):
        found = _source_address(other) if other is not None else None
        if found is not None and not found.startswith("127."):
            return found
    return socket.gethostname()


def _source_address(towards: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # nothing is sent
        except OSError:
            return None
        return str(probe.getsockname()[0])


def node_number(hosts: Sequence[str], environment: Mapping[str, str], names: frozenset[str]) -> int:
    """Which of the hosts this one is, for launchers that are started on each. Raises ConfigError where unknown."""
    for name in ("NODE_RANK", "PET_NODE_RANK", "GROUP_RANK", "SLURM_NODEID"):
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    if len(hosts) == 1:
        return 0
    found = [number for number, host in enumerate(hosts) if host in names]
    if len(found) != 1:
        told = f"nothing says which of the {len(hosts)} hosts this is"
        raise ConfigError.of(told, key="NODE_RANK", location="environment", hint="set it to 0 on the first, and so on")
    return found[0]
