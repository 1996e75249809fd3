"""Kills and full disks: what was saved stays usable, and the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron.checkpoint.format import layout
from megatron.metrics.sinks.jsonl import read_metrics
from tests.end_to_end.runs import BASE, run, run_rank, series
from tests.multi_rank import RankFailedError, run_distributed

ROOT = Path(__file__).resolve().parents[2]


def launch(folder: Path, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    """`deepy.py train.py` as a user starts it, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({**BASE, **settings}))
    command = [sys.executable, str(ROOT / "deepy.py"), "train.py", "run.json"]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the run ended before it saved"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_a_killed_run_goes_on_bitwise_equal(dataset: str, tmp_path: Path) -> None:
    """Kill -9 of the launcher and of every worker, right after a checkpoint appeared; then the same command again."""
    settings = {"data_path": dataset, "save": "save", "load": "save", "checkpoint_factor": 10, "num_gpus": 2}
    settings["zero_optimization"] = {"stage": 1}
    process = launch(tmp_path / "killed", settings)
    family = psutil.Process(process.pid)
    wait_for(tmp_path / "killed" / "save" / "global_step10" / layout.MANIFEST, process)
    for member in [*family.children(recursive=True), family]:
        member.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert launch(tmp_path / "killed", settings).wait(120) == 0, (tmp_path / "killed" / "output.txt").read_text()
    complete = run(2, tmp_path / "whole", data_path=dataset, zero_optimization={"stage": 1})
    records = read_metrics(tmp_path / "killed" / "save" / "logs" / "metrics.jsonl")
    for name in ("train/lm_loss", "train/learning_rate", "train/grad_norm", "validation/lm_loss"):
        assert series(records, name) == series(complete, name), name


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)])
def test_a_signal_saves_and_leaves_with_success(number: signal.Signals, dataset: str, tmp_path: Path) -> None:
    settings = {"data_path": dataset, "save": "save", "checkpoint_factor": 5, "train_iters": 100000}
    process = launch(tmp_path, settings)
    wait_for(tmp_path / "save" / "global_step5" / layout.MANIFEST, process)
    process.send_signal(number)
    assert process.wait(60) == 0, (tmp_path / "output.txt").read_text()
    ended_with_a_checkpoint(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("limit", [{"exit_interval": 7}, {"exit_duration": 1e-6}])
def test_a_limit_saves_and_leaves_with_success(limit: dict[str, float], dataset: str, tmp_path: Path) -> None:
    settings = {"data_path": dataset, "save": "save", "checkpoint_factor": 1000, "train_iters": 100000, **limit}
    assert launch(tmp_path, settings).wait(120) == 0, (tmp_path / "output.txt").read_text()
    assert ended_with_a_checkpoint(tmp_path) == limit.get("exit_interval", 1)


def ended_with_a_checkpoint(folder: Path) -> int:
    """The iteration that the run says it stopped after, which it has saved."""
    stopped = int((folder / "output.txt").read_text().split("stopped after iteration ")[1].split(":")[0])
    assert layout.iterations(folder / "save")[-1] == stopped
    assert (folder / "save" / "latest").read_text() == f"global_step{stopped}"
    return stopped


def limited_rank(rank: int, world_size: int, settings: dict[str, Any], largest_file: int) -> None:
    """A worker whose writes fail past that many bytes a file, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    run_rank(rank, world_size, settings)


@pytest.mark.parametrize("background", [False, True])
def test_a_save_that_cannot_be_written_leaves_the_one_before(background: bool, dataset: str, tmp_path: Path) -> None:
    save = tmp_path / "save"
    settings = {"data_path": dataset, "save": str(save), "load": str(save), "checkpoint_factor": 10}
    settings |= {"checkpoint_async": background}
    run(1, tmp_path, exit_interval=10, **settings)
    full = {**BASE, **settings, "log_dir": str(tmp_path / "logs")}
    with pytest.raises(
        RankFailedError,
        match=r"writing .*global_step20\.partial failed: .*File too large; the checkpoints written before",
    ):
        run_distributed(limited_rank, 1, full, 200_000)
    assert [entry.name for entry in save.iterdir() if entry.is_dir()] == ["global_step10"]
    records = run(1, tmp_path, **settings)
    assert series(records, "train/lm_loss") == series(run(1, tmp_path / "whole", data_path=dataset), "train/lm_loss")


def test_damage_is_reported_before_anything_is_loaded(dataset: str, tmp_path: Path) -> None:
    save = tmp_path / "save"
    settings = {"data_path": dataset, "save": str(save), "checkpoint_factor": 5, "train_iters": 10}
    run(1, tmp_path, **settings)
    weights = save / "global_step10" / "mp_rank_00_model_states.pt"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RankFailedError, match=r"mp_rank_00_model_states\.pt.*choose one with --iteration: 5, or set"):
        run(1, tmp_path, **settings, load=str(save))
    assert run(1, tmp_path / "again", data_path=dataset, load=str(save), iteration=5, train_iters=10)
