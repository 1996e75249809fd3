"""However a run on CPUs ends: its exit code, what it says and has saved, and no shared memory of it on the host.

Each ending is one launch through deepy.py, which every test of that ending looks at.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron.checkpoint.format import layout
from megatron.metrics.sinks.jsonl import read_metrics
from tests.end_to_end.launches import LIMIT, ROOT, Run, free_port
from tests.end_to_end.runs import run as train_alone
from tests.end_to_end.runs import series

SAVING: dict[str, Any] = {"save": "save", "load": "save", "zero_optimization": {"stage": 1}}
SETTINGS: dict[str, dict[str, Any]] = {
    "all killed": {**SAVING, "train_iters": 30, "checkpoint_factor": 10},
    "done": {**SAVING, "train_iters": 30, "checkpoint_factor": 10},
    "failed": {},
    "stopped": {"save": "save", "checkpoint_factor": 5},
    "rank killed": {"pipe_parallel_size": 2},
    "launcher killed": {},
}
"""Ending -> the keys of its run. The one that is done goes on where all were killed, if there was one."""
LONG = [pytest.param(ending, ranks, marks=pytest.mark.long) for ending in SETTINGS for ranks in (1, 4)]


@dataclass
class Ended:
    """A run that is over."""

    folder: Path
    code: int
    seconds: float
    """From the signal that ended it, if one did [s]."""
    said: str
    left: list[str]
    """Shared memory that stayed."""
    survivors: list[psutil.Process]
    """Processes that stayed."""


def segments(port: int) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"deepspeed_*_{port}_*")]


def wait_for(path: Path, run: Run) -> None:
    run.wait(path.exists, pause=0.02)


def bring_to_its_end(run: Run, ending: str, ranks: int) -> list[psutil.Process]:
    """Ends a run that trains; returns the processes that it had below its own."""
    if ending in ("all killed", "stopped"):
        wait_for(run.folder / "save" / f"global_step{SETTINGS[ending]['checkpoint_factor']}" / layout.MANIFEST, run)
    else:
        run.reach(3)
    launcher = psutil.Process(run.process.pid)
    below = launcher.children(recursive=True)
    if ending == "stopped":
        run.process.send_signal(signal.SIGTERM)
    elif ending == "rank killed":
        run.worker(ranks - 1).kill()
    elif ending == "launcher killed":
        launcher.kill()
    else:
        for each in (*below, launcher):
            with suppress(psutil.NoSuchProcess):  # ended by itself after another was killed
                each.kill()
    return below


def works(process: psutil.Process) -> bool:
    """Whether it still runs; one that only waits to be reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(ending: str, ranks: int, folder: Path, dataset: str) -> Ended:
    """Starts a run on so many ranks and ends it in that way."""
    port = free_port()
    settings = {"data_path": dataset, "num_gpus": ranks, "master_port": port, **SETTINGS[ending]}
    if ending == "failed":
        settings["data_path"] = str(folder / "none")
    if ranks == 1:
        settings.pop("pipe_parallel_size", None)
    run = Run(folder, settings)
    family: list[psutil.Process] = []
    if ending not in ("done", "failed"):
        run.reach(1)
        assert segments(port) == []  # while it trains
        family = bring_to_its_end(run, ending, ranks)
    start = time.monotonic()
    code = run.process.wait(120)
    seconds = time.monotonic() - start
    deadline = time.monotonic() + 10  # ranks notice that a killed launcher is gone
    while segments(port) and time.monotonic() < deadline:
        time.sleep(0.1)
    deadline = time.monotonic() + 10
    while any(works(each) for each in family) and time.monotonic() < deadline:
        time.sleep(0.1)
    return Ended(folder, code, seconds, run.said(), segments(port), [each for each in family if works(each)])


@pytest.fixture(scope="module")
def ended(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ended]:
    """Gives the run of two ranks that ended in a way; each is started when it is first asked for."""
    folder = tmp_path_factory.mktemp("ended")
    known: dict[str, Ended] = {}

    def give(ending: str) -> Ended:
        if ending == "done":
            give("all killed")
        if ending not in known:
            position = folder / ("all killed" if ending == "done" else ending)
            known[ending] = end(ending, 2, position, dataset)
        return known[ending]

    return give


@pytest.mark.parametrize("ending", SETTINGS)
def test_no_segment_stays(ending: str, ended: Callable[[str], Ended]) -> None:
    assert ended(ending).left == [], ended(ending).said


@pytest.mark.parametrize(("ending", "ranks"), LONG)
def test_nothing_stays_of_other_numbers_of_ranks(ending: str, ranks: int, dataset: str, tmp_path: Path) -> None:
    found = end(ending, ranks, tmp_path, dataset)
    assert found.left == [] and found.survivors == [], found.said


@pytest.mark.parametrize("ending", SETTINGS)
def test_no_process_stays(ending: str, ended: Callable[[str], Ended]) -> None:
    assert ended(ending).survivors == [], ended(ending).said


def test_a_killed_run_goes_on_bitwise_equal(ended: Callable[[str], Ended], dataset: str, tmp_path: Path) -> None:
    """Kill -9 of the launcher and of every worker, right after a checkpoint appeared; then the same command again."""
    assert ended("all killed").code == -signal.SIGKILL
    assert ended("done").code == 0, ended("done").said
    complete = train_alone(2, tmp_path, data_path=dataset, train_iters=30, zero_optimization={"stage": 1})
    records = read_metrics(ended("done").folder / "logs" / "metrics.jsonl")
    for name in ("train/lm_loss", "train/learning_rate", "train/grad_norm", "validation/lm_loss"):
        assert series(records, name) == series(complete, name), name


def test_a_killed_rank_ends_the_run_with_its_signal(ended: Callable[[str], Ended]) -> None:
    found = ended("rank killed")
    assert found.code == 128 + signal.SIGKILL
    assert found.seconds < LIMIT
    assert "rank 1 failed first, with signal SIGKILL" in found.said


def test_a_run_that_cannot_start_ends_with_an_error(ended: Callable[[str], Ended]) -> None:
    assert ended("failed").code == 2
    assert "data_path" in ended("failed").said


def test_a_stop_signal_saves_and_leaves_with_success(ended: Callable[[str], Ended]) -> None:
    found = ended("stopped")
    assert found.code == 0, found.said
    ended_with_a_checkpoint(found.folder)


def ended_with_a_checkpoint(folder: Path) -> int:
    """The iteration that the run says it stopped after, which it has saved."""
    stopped = int((folder / "output.txt").read_text().split("stopped after iteration ")[1].split(":")[0])
    assert layout.iterations(folder / "save")[-1] == stopped
    assert (folder / "save" / "latest").read_text() == f"global_step{stopped}"
    return stopped


@pytest.mark.long
def test_another_signal_saves_and_leaves_with_success(dataset: str, tmp_path: Path) -> None:
    run = Run(tmp_path, {"data_path": dataset, "save": "save", "checkpoint_factor": 5})
    wait_for(tmp_path / "save" / "global_step5" / layout.MANIFEST, run)
    run.process.send_signal(signal.SIGUSR1)
    assert run.process.wait(60) == 0, run.said()
    ended_with_a_checkpoint(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("limit", [{"exit_interval": 7}, {"exit_duration": 1e-6}])
def test_a_limit_saves_and_leaves_with_success(limit: dict[str, float], dataset: str, tmp_path: Path) -> None:
    run = Run(tmp_path, {"data_path": dataset, "save": "save", "checkpoint_factor": 1000, **limit})
    assert run.process.wait(120) == 0, run.said()
    assert ended_with_a_checkpoint(tmp_path) == limit.get("exit_interval", 1)


@pytest.fixture(scope="module")
def saved(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saved")
    train_alone(1, folder, data_path=dataset, train_iters=1, eval_iters=0, save=str(folder), checkpoint_factor=1)
    return str(folder)


def used(script: str, folder: Path, port: int) -> bool:
    """Whether the model is at work."""
    if script == "generate.py":
        return (folder / "samples.jsonl").exists() and (folder / "samples.jsonl").stat().st_size > 0
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.long
@pytest.mark.parametrize("ending", ["stopped", "all killed"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("script", ["generate.py", "tools/run_text_generation_server.py"])
def test_no_segment_of_a_model_in_use_stays(script: str, ranks: int, ending: str, saved: str, tmp_path: Path) -> None:
    port, serving = free_port(), free_port()
    (tmp_path / "prompts.txt").write_text("def read(\n" * 5000)
    settings = {"load": saved, "num_gpus": ranks, "master_port": port, "serve_port": serving, "maximum_tokens": 20}
    settings |= {"model_parallel_size": min(ranks, 2), "sample_input_file": "prompts.txt"}
    run = Run(tmp_path, settings | {"sample_output_file": "samples.jsonl"}, str(ROOT / script))
    run.wait(lambda: used(script, tmp_path, serving))
    assert segments(port) == []
    launcher = psutil.Process(run.process.pid)
    if ending == "stopped":
        launcher.terminate()
    else:
        for each in (launcher, *launcher.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()
    run.process.wait(90)
    time.sleep(1.0)
    assert segments(port) == [], run.said()
