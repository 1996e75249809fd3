"""The whole of what checkpoints promise: every layout continues every other, and two-rank runs survive being killed."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron.checkpoint import find
from megatron.observe.sinks.jsonl import read_metrics
from tests.end_to_end.runs import make_dataset, run, series
from tests.end_to_end.test_crash import launch

pytestmark = pytest.mark.long

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor 2": (2, {"model_parallel_size": 2}),
    "pipeline 2": (2, {"pipe_parallel_size": 2}),
    "data 2, ZeRO 1": (2, {"zero_optimization": {"stage": 1}}),
    "data 2, ZeRO 3": (2, {"zero_optimization": {"stage": 3}}),
    "tensor 2, pipeline 2, ZeRO 1": (
        4,
        {"model_parallel_size": 2, "pipe_parallel_size": 2, "zero_optimization": {"stage": 1}},
    ),
}
FROM, FURTHER = 10, 5  # steps


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def saved(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each layout's checkpoint at step 10."""
    folders = {}
    for name, (world_size, settings) in LAYOUTS.items():
        folders[name] = tmp_path_factory.mktemp("save")
        told = {"data_path": dataset, "save": str(folders[name]), "checkpoint_factor": 100, **settings}
        run(world_size, folders[name], exit_interval=FROM, **told)
    return folders


@pytest.fixture(scope="module")
def whole(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run that nothing disturbed."""
    return series(run(1, tmp_path_factory.mktemp("whole"), data_path=dataset), "train/lm_loss")


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_continues_every_other(
    source: str, target: str, saved: dict[str, Path], whole: list[float], dataset: str, tmp_path: Path
) -> None:
    world_size, settings = LAYOUTS[target]
    told = {"data_path": dataset, "load": str(saved[source]), "exit_interval": FROM + FURTHER, **settings}
    losses = series(run(world_size, tmp_path, **told), "train/lm_loss")
    assert losses == pytest.approx(whole[FROM : FROM + FURTHER], rel=1e-5)


def kill_after(process: Any, seconds: float) -> bool:
    """Kills the launcher and all its workers after that long; whether it was still running."""
    family = psutil.Process(process.pid)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        time.sleep(0.02)
    for member in [*family.children(recursive=True), family]:
        member.send_signal(signal.SIGKILL)
    process.wait(30)
    return True


@pytest.mark.parametrize("background", [False, True])
def test_two_ranks_survive_ten_kills(background: bool, dataset: str, tmp_path: Path) -> None:
    """A save every step; each kill comes some moment after training goes on. The end is that of an undisturbed run."""
    settings = {"data_path": dataset, "save": "save", "load": "save", "checkpoint_factor": 1, "num_gpus": 2}
    settings |= {"zero_optimization": {"stage": 1}, "keep_last_n_checkpoints": 3, "train_iters": 60}
    settings |= {"checkpoint_async": background, "eval_iters": 0}
    chance = random.Random(int(background))
    save = tmp_path / "run" / "save"
    for _ in range(10):
        before = (save / "latest").stat().st_mtime_ns if (save / "latest").exists() else 0
        process = launch(tmp_path / "run", settings)
        while process.poll() is None and not (
            (save / "latest").exists() and (save / "latest").stat().st_mtime_ns > before
        ):
            time.sleep(0.02)
        if not kill_after(process, chance.uniform(0, 0.6)):
            break
        assert find.whole(save, None, "error") is not None
    assert launch(tmp_path / "run", settings).wait(240) == 0, (tmp_path / "run" / "output.txt").read_text()
    records = read_metrics(save / "logs" / "metrics.jsonl")
    undisturbed = {key: settings[key] for key in ("data_path", "zero_optimization", "train_iters", "eval_iters")}
    expected = series(run(2, tmp_path / "whole", **undisturbed), "train/lm_loss")
    assert series(records, "train/lm_loss")[-1] == expected[-1]
