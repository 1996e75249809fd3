"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, as children of this process."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/builtin
MpiDefault=none
ReturnToService=2
KillWait=60
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """A running cluster. environment: what its commands need."""

    environment: dict[str, str]

    def call(self, *command: str, cwd: Path, check: bool = True, seconds: float = 150) -> str:
        """Runs one of its commands; returns what it printed on both outputs."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stdout
        return done.stdout

    def state(self, job: str) -> str:
        """What the controller says of a job, such as RUNNING or CANCELLED."""
        shown = self.call("scontrol", "show", "job", job, cwd=Path("/"))
        return shown.split("JobState=")[1].split()[0]

    def wait(self, job: str, *states: str, seconds: float = 120) -> None:
        """Waits until the job is in one of the states."""
        deadline = time.monotonic() + seconds
        while (found := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {found}, not {' or '.join(states)}"
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as opened:
        probes = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """The cluster; it needs root, as its daemons do."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    assert not missing, f"apt install munge slurmctld slurmd slurm-client (missing: {', '.join(missing)})"
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=socket.gethostname(), folder=folder, ports=_free_ports(3)))
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munged += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    daemons = [
        munged,
        ["slurmctld", "-D", "-c", "-f", str(configuration)],
        *(["slurmd", "-D", "-N", node, "-f", str(configuration)] for node in ("n1", "n2")),
    ]
    environment = {**os.environ, "SLURM_CONF": str(configuration), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    running: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "daemons.txt").open("wb") as log:
            for command in daemons:
                running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
                if command is munged:
                    _wait_for_path(folder / "munge.socket")
        slurm = Slurm(environment)
        _wait_for_nodes(slurm)
        yield slurm
    finally:
        for daemon in reversed(running):
            daemon.terminate()
        for daemon in running:
            daemon.wait(30)


def _wait_for_path(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def _wait_for_nodes(slurm: Slurm) -> None:
    deadline = time.monotonic() + 60
    while (reported := slurm.call("sinfo", "-h", "-o", "%D %t", cwd=Path("/"), check=False).strip()) != "2 idle":
        assert time.monotonic() < deadline, reported
        time.sleep(0.3)
