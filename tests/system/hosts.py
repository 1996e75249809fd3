"""Three hosts on this machine: network namespaces with names of their own, two of them with an sshd."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = ("ip", "tc", "sshd", "ssh", "ssh-keygen", "unshare", "pdsh", "mpirun.openmpi", "mpirun.mpich")
BRIDGE, NETWORK = "neox-bridge", "10.213.77"
LOGIN, FIRST, SECOND = "neox-login", "neox-one", "neox-two"
ADDRESSES = {LOGIN: f"{NETWORK}.1", FIRST: f"{NETWORK}.11", SECOND: f"{NETWORK}.12"}
NAMESPACES = Path("/etc/netns")  # what is under it is /etc inside

SERVER = """\
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/{host}.keys
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
"""
CLIENT = """\
IdentityFile {folder}/user_key
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


@dataclass
class Hosts:
    """The hosts. folder: where their keys are."""

    folder: Path

    def inside(self, host: str, command: Sequence[str]) -> list[str]:
        """The command as it is run on that host."""
        return ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', host, *command]

    def start(self, host: str, command: Sequence[str], cwd: Path, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.inside(host, command),
            cwd=cwd,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, host: str, command: Sequence[str], cwd: Path, **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command on that host."""
        process = self.start(host, command, cwd, **environment)
        out, err = process.communicate(timeout=150)
        return process.returncode, out, err

    def admit(self, host: str, *, user: bool = True) -> None:
        """Lets the user in by key, or not."""
        key = (self.folder / "user_key.pub").read_text() if user else ""
        (self.folder / f"{host}.keys").write_text(key)

    def link(self, host: str, state: str) -> None:
        """Puts the cable between a host and the others "down" or "up"."""
        _ip("link", "set", f"neox-v{list(ADDRESSES).index(host)}", state)

    def limit(self, host: str, rate: str | None) -> None:
        """Lets a host send no faster than a rate such as "20mbit"; None for as fast as it can."""
        filtered = ["tbf", "rate", rate, "burst", "64kb", "latency", "500ms"] if rate else []
        change = ["replace" if rate else "del", "dev", "eth0", "root", *filtered]
        subprocess.run(["tc", "-n", host, "qdisc", *change], check=True, capture_output=True)

    def workers(self) -> list[str]:
        """The command lines of all Python processes on the hosts."""
        return [line for host in ADDRESSES for line in self._python(host).values()]

    def lose(self, host: str) -> None:
        """Takes a host away as its power supply may: nothing of it answers, and its Python processes are gone."""
        self.link(host, "down")
        for pid in self._python(host):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _python(self, host: str) -> dict[int, str]:
        """Command lines of a host's Python processes by their number."""
        found = {}
        for pid in subprocess.check_output(["ip", "netns", "pids", host], text=True).split():
            with suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                if "python" in line:
                    found[int(pid)] = line
        return found

    def wait_until_idle(self, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while left := self.workers():
            assert time.monotonic() < deadline, left
            time.sleep(0.2)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _lay_out(folder: Path) -> None:
    """Network, names and keys."""
    _ip("link", "add", BRIDGE, "type", "bridge")
    _ip("link", "set", BRIDGE, "up")
    names = "127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in ADDRESSES.items())
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    for number, (host, address) in enumerate(ADDRESSES.items()):
        etc = NAMESPACES / host
        (etc / "ssh").mkdir(parents=True)
        (etc / "hosts").write_text(names)
        (etc / "ssh" / "ssh_config").write_text(CLIENT.format(folder=folder))
        (etc / "ssh" / "sshd_config").write_text(SERVER.format(folder=folder, host=host))
        _ip("netns", "add", host)
        _ip("link", "add", f"neox-v{number}", "type", "veth", "peer", "name", "eth0", "netns", host)
        _ip("link", "set", f"neox-v{number}", "master", BRIDGE, "up")
        _ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", host, "link", "set", device, "up")


def _clear() -> None:
    for host in ADDRESSES:
        shutil.rmtree(NAMESPACES / host, ignore_errors=True)
        subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)
    subprocess.run(["ip", "link", "delete", BRIDGE], check=False, capture_output=True)


@contextmanager
def hosts(folder: Path) -> Iterator[Hosts]:
    """The hosts; they need root and the network namespaces of the kernel."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]
    assert not missing, f"apt install iproute2 openssh-server pdsh openmpi-bin mpich (missing: {', '.join(missing)})"
    Path("/run/sshd").mkdir(exist_ok=True)
    _clear()
    found = Hosts(folder)
    servers: list[subprocess.Popen[Any]] = []
    try:
        _lay_out(folder)
        for host in (FIRST, SECOND):
            found.admit(host)
            command = ["/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/sshd_config"]
            with (folder / f"{host}.txt").open("wb") as log:
                servers.append(subprocess.Popen(found.inside(host, command), stdout=log, stderr=log))
        deadline = time.monotonic() + 30
        for host in (FIRST, SECOND):
            while found.call(LOGIN, ["ssh", host, "true"], folder)[0] != 0:
                assert time.monotonic() < deadline, (folder / f"{host}.txt").read_text()
                time.sleep(0.2)
        yield found
    finally:
        for server in servers:
            server.terminate()
            server.wait(30)
        _clear()
