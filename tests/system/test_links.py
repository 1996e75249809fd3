"""Links between hosts that are cut or slow: the run ends in time and names the host, or goes on as it was."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.runs import run, series
from tests.system.hosts import FIRST, LOGIN, SECOND, Hosts, hosts
from tests.system.training import DEEPY, ENDLESS, SCHEDULE, TRAIN, losses, wait_until_saved, write

pytestmark = pytest.mark.system

LIMIT = 10.0  # [s] collective_timeout
MEETING = {"WORLD_SIZE": "2", "MASTER_ADDR": FIRST, "MASTER_PORT": "23456"}


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(tmp_path_factory.mktemp("hosts")) as found:
        yield found


def started(machines: Hosts, folder: Path) -> list[subprocess.Popen[str]]:
    """A rank on each of two hosts."""
    return [
        machines.start(host, TRAIN, folder, RANK=str(number), **MEETING) for number, host in enumerate((FIRST, SECOND))
    ]


def test_a_cut_link_ends_the_run_and_names_the_host(machines: Hosts, dataset: str, tmp_path: Path) -> None:
    write(tmp_path, dataset, train_iters=ENDLESS, collective_timeout=LIMIT)
    first, second = started(machines, tmp_path)
    try:
        wait_until_saved(tmp_path)
        machines.link(SECOND, "down")
        began = time.monotonic()
        out, err = first.communicate(timeout=LIMIT + 60)
        assert first.returncode == 1
        assert time.monotonic() - began < LIMIT + 15, out + err
        assert f"Waited for: rank 1 (host {SECOND}" in out + err and "no heartbeat for" in out + err, out + err
        out, err = second.communicate(timeout=LIMIT + 60)
        assert second.returncode == 1
        assert f"no reply from {FIRST}" in out + err and f"this host ({SECOND}) is disconnected" in out + err
    finally:
        machines.link(SECOND, "up")
        first.kill()
        second.kill()
    machines.wait_until_idle()


def test_deepy_ends_when_a_link_is_cut(machines: Hosts, dataset: str, tmp_path: Path) -> None:
    """The host behind the cut gets no message; its rank ends by itself."""
    (tmp_path / "hostfile").write_text(f"{FIRST} slots=1\n{SECOND} slots=1\n")
    write(tmp_path, dataset, hostfile="hostfile", train_iters=ENDLESS, collective_timeout=LIMIT)
    process = machines.start(LOGIN, DEEPY, tmp_path)
    try:
        wait_until_saved(tmp_path)
        machines.link(SECOND, "down")
        began = time.monotonic()
        out, err = process.communicate(timeout=LIMIT + 90)
        assert process.returncode == 1, out + err
        assert time.monotonic() - began < LIMIT + 45, out + err
        assert f"rank 1 (host {SECOND}" in out + err, out + err
    finally:
        machines.link(SECOND, "up")
        process.kill()
    machines.wait_until_idle(60)


def test_the_run_goes_on_without_a_host_that_is_gone(machines: Hosts, dataset: str, tmp_path: Path) -> None:
    """One rank is left of two, and takes twice the micro-batches: the losses of an undisturbed run."""
    schedule = {**SCHEDULE, "train_iters": 100, "lr_decay_iters": 100}
    (tmp_path / "hostfile").write_text(f"{FIRST} slots=1\n{SECOND} slots=1\n")
    write(tmp_path, dataset, **schedule, hostfile="hostfile", collective_timeout=LIMIT, max_restarts=1)
    process = machines.start(LOGIN, DEEPY, tmp_path)
    try:
        wait_until_saved(tmp_path)
        machines.lose(SECOND)
        out, err = process.communicate(timeout=LIMIT + 150)
    finally:
        machines.link(SECOND, "up")
        process.kill()
    assert process.returncode == 0, out + err
    assert "restart 1 of 1: the run continues from its newest checkpoint, on 1 ranks" in err, out + err
    full = series(run(2, tmp_path / "whole", data_path=dataset, **schedule), "train/lm_loss")
    assert losses(tmp_path) == pytest.approx(full, rel=1e-5)
    machines.wait_until_idle(60)


def test_a_slow_link_shows_in_the_table_and_changes_no_loss(
    machines: Hosts, dataset: str, undisturbed: list[float], tmp_path: Path
) -> None:
    """20 Mbit/s are 2.5 MB/s; the table gives the bandwidth of an all-reduce."""
    write(tmp_path, dataset)
    machines.limit(SECOND, "20mbit")
    try:
        processes = started(machines, tmp_path)
        reported = ["".join(process.communicate(timeout=200)) for process in processes]
    finally:
        machines.limit(SECOND, None)
    assert [process.returncode for process in processes] == [0, 0], reported
    speeds = [float(found) for found in re.findall(r"neox-(?:one|two) .*?([\d.]+) GB/s", reported[0])]
    assert len(speeds) == 2 and max(speeds) <= 0.01, reported[0]
    assert losses(tmp_path) == pytest.approx(undisturbed, rel=1e-6)


def test_separate_disks_are_reported_and_can_be_used(
    machines: Hosts, dataset: str, undisturbed: list[float], tmp_path: Path
) -> None:
    """Each host has another folder under the same name, as a mount of its own."""
    (tmp_path / "work").mkdir()
    for host in (FIRST, SECOND):
        (tmp_path / host).mkdir()
        write(tmp_path / host, dataset, save=str(tmp_path / "work" / "save"), load=str(tmp_path / "work" / "save"))
    reported = on_own_disks(machines, tmp_path, good=False)
    assert all("the run directory is not the one that rank 0 sees" in each for each in reported), reported
    for host in (FIRST, SECOND):
        save = str(tmp_path / "work" / "save")
        write(tmp_path / host, dataset, save=save, load=save, use_shared_fs=False, checkpoint_factor=10)
    reported = on_own_disks(machines, tmp_path, good=True)
    assert re.search(rf"{SECOND} .* no  ", reported[0]), reported[0]
    assert losses(tmp_path / FIRST) == pytest.approx(undisturbed, rel=1e-6)
    for host in (FIRST, SECOND):
        assert (tmp_path / host / "save" / "latest").read_text() == "global_step20"
        assert (tmp_path / host / "save" / "global_step20" / "state" / "rank_00001.pt").is_file()


def on_own_disks(machines: Hosts, folder: Path, *, good: bool) -> list[str]:
    """What the ranks say that see their own folder as `work`; good: they must end well, else none may."""
    processes = []
    for number, host in enumerate((FIRST, SECOND)):
        mounted = f"mount --bind {folder / host} {folder / 'work'} && cd {folder / 'work'} && exec "
        command = ["unshare", "--mount", "sh", "-c", mounted + " ".join(TRAIN)]
        processes.append(machines.start(host, command, folder, RANK=str(number), **MEETING))
    reported = ["".join(process.communicate(timeout=150)) for process in processes]
    assert all((process.returncode == 0) == good for process in processes), reported
    return reported
