"""The whole of what checkpoints promise: every layout continues every other, and two-rank runs survive being killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron.checkpoint.format import layout
from megatron.checkpoint.load import find
from megatron.metrics.sinks.jsonl import read_metrics
from tests.checkpoint.test_commit import tear
from tests.end_to_end.launches import ROOT, launch
from tests.end_to_end.runs import BASE, run, series

pytestmark = pytest.mark.long

MODEL = {"num_attention_heads": 8, "num_kv_heads": 4}  # what four tensor-parallel ranks can share
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor 2, pipeline 2, data 2, ZeRO 1": (
        8,
        {"model_parallel_size": 2, "pipe_parallel_size": 2, "zero_optimization": {"stage": 1}},
    ),
    "tensor 4, data 2, ZeRO 2": (8, {"model_parallel_size": 4, "zero_optimization": {"stage": 2}}),
    "pipeline 4": (4, {"pipe_parallel_size": 4}),
    "pipeline 1, tensor 2": (2, {"pipe_parallel_size": 1, "model_parallel_size": 2}),
    "data 4, ZeRO 3": (4, {"zero_optimization": {"stage": 3}}),
}
FROM, FURTHER = 10, 5  # steps


@pytest.fixture(scope="module")
def saved(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each layout's checkpoint at step 10."""
    folders = {}
    for name, (world_size, settings) in LAYOUTS.items():
        folders[name] = tmp_path_factory.mktemp("save")
        reported = {"data_path": dataset, "save": str(folders[name]), "checkpoint_factor": 100, **MODEL, **settings}
        run(world_size, folders[name], exit_interval=FROM, **reported)
    return folders


@pytest.fixture(scope="module")
def full(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run that nothing disturbed."""
    return series(run(1, tmp_path_factory.mktemp("whole"), data_path=dataset, **MODEL), "train/lm_loss")


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_continues_every_other(
    source: str, target: str, saved: dict[str, Path], full: list[float], dataset: str, tmp_path: Path
) -> None:
    world_size, settings = LAYOUTS[target]
    reported = {"data_path": dataset, "load": str(saved[source]), "exit_interval": FROM + FURTHER, **MODEL, **settings}
    losses = series(run(world_size, tmp_path, **reported), "train/lm_loss")
    assert losses == pytest.approx(full[FROM : FROM + FURTHER], rel=1e-5)


DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
STOPPED: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2, pipeline 2, data 2, ZeRO 1": LAYOUTS["tensor 2, pipeline 2, data 2, ZeRO 1"],
    "tensor 2, data 2, ZeRO 3": (4, {"model_parallel_size": 2, "zero_optimization": {"stage": 3}}),
    "tensor 4, data 2, ZeRO 2": LAYOUTS["tensor 4, data 2, ZeRO 2"],
    "tensor 2, sequence parallel": (2, {"model_parallel_size": 2, "sequence_parallel": True}),
    "context 2": (2, {"context_parallel_size": 2}),
    "context 2, tensor 2, ZeRO 1": (
        4,
        {"context_parallel_size": 2, "model_parallel_size": 2, "zero_optimization": {"stage": 1}},
    ),
    "pipeline 4, accumulation 4": (4, {"pipe_parallel_size": 4, "gradient_accumulation_steps": 4}),
    "pipeline 2, data 2, ZeRO 1, bfloat16": (
        4,
        {"pipe_parallel_size": 2, "zero_optimization": {"stage": 1}, "precision": "bfloat16"},
    ),
    "data 2, ZeRO 3, offload": (
        2,
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}},
    ),
    "recomputed blocks": (2, {"model_parallel_size": 2, "checkpoint_activations": True}),
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_stop_changes_no_bit(name: str, dataset: str, tmp_path: Path) -> None:
    """With dropout, so that the generators of every rank count."""
    world_size, settings = STOPPED[name]
    reported = {"data_path": dataset, **MODEL, **DROPOUT, **settings}
    full = run(world_size, tmp_path / "whole", **reported)
    reported |= {"save": str(tmp_path / "save"), "load": str(tmp_path / "save"), "checkpoint_factor": 100}
    run(world_size, tmp_path / "parts", exit_interval=7, **reported)
    resumed = run(world_size, tmp_path / "parts", **reported)
    for metric in ("train/lm_loss", "train/learning_rate", "train/grad_norm", "validation/lm_loss", "consumed_tokens"):
        assert series(resumed, metric) == series(full, metric), metric


def kill_after(process: Any, seconds: float) -> bool:
    """Kills the launcher and all its workers after that long; whether it was still running."""
    family = psutil.Process(process.pid)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        time.sleep(0.02)
    for member in [family, *family.children(recursive=True)]:  # the launcher first, so that it ends no process itself
        with suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait(30)
    return True


@pytest.mark.parametrize("background", [False, True])
def test_two_ranks_survive_ten_kills(background: bool, dataset: str, tmp_path: Path) -> None:
    """A save every step; each kill comes some moment after training goes on. The end is that of an undisturbed run."""
    settings = {"data_path": dataset, "save": "save", "load": "save", "checkpoint_factor": 1, "num_gpus": 2}
    settings |= {"zero_optimization": {"stage": 1}, "keep_last_n_checkpoints": 3, "train_iters": 2000}
    settings |= {"checkpoint_async": background, "eval_iters": 0}
    chance = random.Random(int(background))
    save = tmp_path / "run" / "save"
    for _ in range(10):
        before = moved(save)
        process = launch(tmp_path / "run", settings)
        while process.poll() is None and moved(save) == before:
            time.sleep(0.02)
        assert kill_after(process, chance.uniform(0, 0.6)), (tmp_path / "run" / "output.txt").read_text()
        tear(save, chance)
        assert find.find_intact(save, None, "error") is not None
    last = layout.iterations(save)[-1] + 10
    assert launch(tmp_path / "run", {**settings, "exit_interval": last}).wait(240) == 0
    records = read_metrics(save / "logs" / "metrics.jsonl")
    undisturbed = {key: settings[key] for key in ("data_path", "zero_optimization", "train_iters", "eval_iters")}
    expected = run(2, tmp_path / "whole", **undisturbed, exit_interval=last)
    for name in ("train/lm_loss", "train/grad_norm", "consumed_tokens"):
        assert series(records, name)[-10:] == series(expected, name)[-10:], name


def moved(save: Path) -> int:
    """When `latest` was last moved [ns]; 0 before there is one."""
    return (save / layout.LATEST).stat().st_mtime_ns if (save / layout.LATEST).exists() else 0


FULL_DISK = """
mount -t tmpfs -o size=9m none disk || exit 9
{python} {door} train.py run.json
code=$?
cp -a disk kept
exit $code
"""


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_up_leaves_the_last_full_checkpoint(background: bool, dataset: str, tmp_path: Path) -> None:
    """A real file system of a few megabytes, in a mount namespace of its own; what is on it is looked at after."""
    settings = {"data_path": dataset, "save": "disk", "load": "disk", "checkpoint_factor": 2, "log_dir": "logs"}
    settings |= {"checkpoint_async": background}
    (tmp_path / "disk").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({**BASE, **settings}))
    script = FULL_DISK.format(python=sys.executable, door=ROOT / "deepy.py")
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "No space left on device" in said and "the checkpoints written before are complete" in said, said
    retained = tmp_path / "kept"
    last = layout.iterations(retained)[-1]
    assert 2 <= last < 18
    assert find.find_intact(retained, None, "error") == retained / f"global_step{last}"
    assert not list(retained.glob("*.partial"))
    settings = {"data_path": dataset, "load": str(retained)}
    losses = series(run(1, tmp_path / "on", **settings), "train/lm_loss")
    assert losses == series(run(1, tmp_path / "whole", data_path=dataset), "train/lm_loss")[last:]
