"""Hosts with names and sshd of their own: the launchers that start ranks over ssh, or that run on each host."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.hosts import FIRST, LOGIN, SECOND, Hosts, hosts
from tests.system.training import DEEPY, ENDLESS, TRAIN, last_saved, losses, stopped_after, wait_until_saved, write

pytestmark = pytest.mark.system

AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
MPIS = {"openmpi": "mpirun.openmpi", "mpich": "mpirun.mpich"}


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(tmp_path_factory.mktemp("hosts")) as found:
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hostfile").write_text(f"{FIRST} slots=1\n{SECOND} slots=1\n")
    return tmp_path


def test_pdsh_trains_on_two_hosts(machines: Hosts, folder: Path, dataset: str, undisturbed: list[float]) -> None:
    write(folder, dataset, hostfile="hostfile")
    code, out, err = machines.call(LOGIN, DEEPY, folder)
    assert code == 0, out + err
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-6)
    machines.wait_until_idle()


@pytest.mark.parametrize("launcher", MPIS)
def test_mpirun_trains_on_two_hosts(
    launcher: str,
    machines: Hosts,
    folder: Path,
    dataset: str,
    undisturbed: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "mpirun").write_text(f'#!/bin/sh\nexec {MPIS[launcher]} "$@"\n')
    (folder / "bin" / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")
    write(folder, dataset, hostfile="hostfile", launcher=launcher)
    code, out, err = machines.call(LOGIN, DEEPY, folder, **AS_ROOT)
    assert code == 0, out + err
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-6)
    machines.wait_until_idle()


def test_a_stop_signal_saves_on_other_hosts_too(machines: Hosts, folder: Path, dataset: str) -> None:
    write(folder, dataset, hostfile="hostfile", train_iters=ENDLESS)
    process = machines.start(LOGIN, DEEPY, folder)
    wait_until_saved(folder)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, out + err
    assert last_saved(folder) == stopped_after(out + err)
    machines.wait_until_idle()


def test_hosts_that_cannot_be_reached_are_all_named(machines: Hosts, folder: Path, dataset: str) -> None:
    """An unknown host name and a rejected key are reported before anything starts, with ssh's own message."""
    machines.admit(SECOND, user=False)
    try:
        (folder / "hostfile").write_text(f"{FIRST} slots=1\n{SECOND} slots=1\nneox-three slots=1\n")
        write(folder, dataset, hostfile="hostfile", train_batch_size=9)
        began = time.monotonic()
        code, _, err = machines.call(LOGIN, DEEPY, folder)
    finally:
        machines.admit(SECOND)
    assert code == 2
    assert time.monotonic() - began < 40
    reported = [line for line in err.splitlines() if line.startswith("hostfile = ")]
    assert [line.split("'")[1] for line in reported] == [SECOND, "neox-three"]
    assert "Permission denied (publickey" in reported[0]
    assert "Could not resolve hostname neox-three" in reported[1]
    assert not (folder / "save" / "logs" / "rank_0.log").exists()


def test_torchrun_on_each_host(machines: Hosts, folder: Path, dataset: str, undisturbed: list[float]) -> None:
    write(folder, dataset, launcher="torchrun", num_nodes=2, num_gpus=1, master_addr=FIRST)
    started = [
        machines.start(host, DEEPY, folder, NODE_RANK=str(number)) for number, host in enumerate((FIRST, SECOND))
    ]
    for process in started:
        out, err = process.communicate(timeout=150)
        assert process.returncode == 0, out + err
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-6)


def test_plain_variables_as_kubernetes_sets_them(
    machines: Hosts, folder: Path, dataset: str, undisturbed: list[float]
) -> None:
    write(folder, dataset)
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": FIRST, "MASTER_PORT": "23456"}
    started = [
        machines.start(host, TRAIN, folder, RANK=str(number), **meeting) for number, host in enumerate((FIRST, SECOND))
    ]
    for process in started:
        out, err = process.communicate(timeout=150)
        assert process.returncode == 0, out + err
    assert losses(folder) == pytest.approx(undisturbed, rel=1e-6)
