"""Runs that are started through deepy.py as a user starts them, each in a folder of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from megatron.metrics.sinks.jsonl import read_metrics
from tests.end_to_end.runs import BASE

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 8.0  # [s] collective_timeout
SETTINGS: dict[str, Any] = {"train_iters": 100000, "collective_timeout": LIMIT, "num_gpus": 2}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(folder: Path, settings: dict[str, Any], script: str = "train.py") -> subprocess.Popen[bytes]:
    """`deepy.py train.py` as a user starts it, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({**BASE, **settings}))
    command = [sys.executable, str(ROOT / "deepy.py"), script, "run.json"]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


class Run:
    """A launch that can be watched and ended; it trains until then, unless the settings say otherwise."""

    def __init__(self, folder: Path, settings: dict[str, Any], script: str = "train.py") -> None:
        self.folder, self.script = folder, script
        self.process = launch(folder, {**SETTINGS, "log_dir": "logs", **settings}, script)

    def reach(self, iteration: int) -> None:
        """Waits until that many iterations were logged."""
        metrics = self.folder / "logs" / "metrics.jsonl"
        self.wait(
            lambda: metrics.exists() and any(each["iteration"] >= iteration for each in read_metrics(metrics)), 0.02
        )

    def wait(self, reached: Callable[[], bool], pause: float = 0.1) -> None:
        """Waits until something is so, while the run goes on. pause [s]: between two looks."""
        deadline = time.monotonic() + 120
        while not reached():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(pause)

    def worker(self, rank: int) -> psutil.Process:
        """The process of a rank: the one whose environment says so and that runs the script itself."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            command = child.cmdline()
            works = (
                self.script in " ".join(command) and "megatron.launcher.rank_agent" not in command and "-u" in command
            )
            if works and child.environ().get("RANK") == str(rank):
                return child
        raise AssertionError(f"no worker of rank {rank}")

    def family(self) -> list[psutil.Process]:
        """The processes below the launcher."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, seconds: float, family: list[psutil.Process] | None = None) -> int:
        """The exit code, which must come within that time, with no process left of the family, or of that of now."""
        family = self.family() if family is None else family
        code = self.process.wait(seconds)
        _, left = psutil.wait_procs(family, timeout=5)
        assert not left, left
        return code

    def stop(self) -> None:
        """Kills what still runs of it."""
        if self.process.poll() is None:
            for each in (*self.family(), psutil.Process(self.process.pid)):
                with suppress(psutil.NoSuchProcess):
                    each.kill()

    def said(self) -> str:
        return (self.folder / "output.txt").read_text()
