"""Hosts are asked before anything starts, and the address of this one is that of the right network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from megatron.launcher.ssh_check import SshResult, check_hosts, check_launcher, check_ssh, own_address

SSH = """\
#!/bin/sh
# Stands in for ssh: the host is the last word but one.
for word; do before=$host; host=$word; done
case "$before" in
  good*) echo "10.0.0.7 fe80::1"; exit 0 ;;
  odd*) exit 3 ;;
  usage*) echo "Usage: hostname [-s]"; exit 1 ;;
  wrong*) echo "10.0.0.9"; exit 1 ;;
  chatty*) printf 'Loading cuda/12.4\n10 modules\n10.0.0.8 172.17.0.1 \nGoodbye\n' ;;
  notice*) printf '192.168.0.1\n10.0.0.8\n\n' ;;
  words*) echo "Welcome to 10.0.0.8" ;;
  local*) echo "127.0.0.1 fe80::1 169.254.3.4 fd00::7 10.0.0.8" ;;
  scoped*) echo "fe80::1%eth0" ;;
  nothing*) echo ;;
  closed*) echo "warning: something" >&2; echo "$*: Permission denied (publickey)." >&2; exit 255 ;;
  *) exit 255 ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_answers(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", environment["PATH"])
    assert check_ssh("good", environment).address == "10.0.0.7"
    assert check_ssh("odd", environment).error is None  # it lets the user in, whatever the command says
    assert str(check_ssh("closed", environment).error).endswith("Permission denied (publickey).")
    reported = str(check_ssh("closed", {**environment, "PDSH_SSH_ARGS_APPEND": "-p 2222"}).error)
    assert "-o BatchMode=yes -o ConnectTimeout=10 -p 2222 closed hostname -I" in reported
    assert check_ssh("silent", environment).error == "ssh gives no reason"


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("usage", None),
        ("wrong", None),
        ("chatty", "10.0.0.8"),
        ("notice", "10.0.0.8"),
        ("words", None),
        ("local", "fd00::7"),
        ("scoped", None),
        ("nothing", None),
    ],
)
def test_only_an_address_of_a_command_that_succeeded_is_taken(
    host: str, address: str | None, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login shell may print lines of its own; without an address the host is met by its name."""
    monkeypatch.setenv("PATH", environment["PATH"])
    assert check_ssh(host, environment) == SshResult(host, address=address)


def test_every_host_that_fails_is_named(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", environment["PATH"])
    assert check_hosts("pdsh", ["good1", "good2"], environment) == "10.0.0.7"
    with pytest.raises(ConfigError) as error:
        check_hosts("openmpi", ["good", "closed", "silent"], environment)
    assert [issue.value for issue in error.value.issues] == ["closed", "silent"]
    assert "leave the host out with exclude" in str(error.value)
    assert check_hosts("slurm", ["silent"], environment) is None  # srun needs no ssh


def test_a_host_without_ssh(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="launcher = 'pdsh': there is no pdsh and no ssh on this host"):
        check_launcher("pdsh", {"PATH": str(tmp_path)})
    (tmp_path / "flux").touch(0o755)
    check_launcher("flux", {"PATH": str(tmp_path)})


def test_own_address() -> None:
    assert own_address("127.0.0.1") == own_address(None)  # loopback leads to no other host
    assert own_address("no-such-host.invalid")
