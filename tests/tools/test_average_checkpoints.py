"""The tool that averages the last checkpoints of a run, as a user calls it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.format import layout
from megatron.checkpoint.format.history import ancestors
from megatron.checkpoint.load.stored_model import open_model
from megatron.checkpoint.offline.average import Chosen, chosen_iterations
from tests.end_to_end.runs import make_dataset, run
from tools import average_checkpoints, inspect_checkpoint

STEPS, DECAY = 4, 0.6
SETTINGS: dict[str, Any] = {
    "train_iters": STEPS,
    "eval_iters": 0,
    "checkpoint_factor": 1,
    "precision": "bfloat16",
    "num_layers": 1,
    "zero_optimization": {"stage": 1},
    "model_parallel_size": 2,
    "ema_decay": DECAY,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A save folder with the checkpoints of four steps in bfloat16, on two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("saved")
    run(2, folder, **SETTINGS, data_path=make_dataset(folder), save=str(folder / "save"))
    return folder / "save"


def test_the_mean_is_that_of_the_fp32_copies(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of iterations 2 to 4, rounded once; it has no state of the optimizer, and a run can begin with it."""
    arguments = [f"--load-dir={saved}", f"--save-dir={tmp_path / 'mean'}", "--last=3"]
    assert average_checkpoints.main([*arguments, "--target-pipeline-parallel-size=2"]) == 0
    assert "the mean of iterations 2, 3, 4" in capsys.readouterr().out
    models, mean = [open_model(saved, iteration=number) for number in (2, 3, 4)], open_model(tmp_path / "mean")
    assert mean.masters is None
    for shape in mean.table:
        exact = sum(model.full_tensor(shape, precise=True).double() for model in models) / 3
        found = mean.full_tensor(shape)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, exact.bfloat16(), rtol=2**-7, atol=0)
    assert inspect_checkpoint.main([str(tmp_path / "mean")]) == 0
    capsys.readouterr()
    assert average_checkpoints.main(arguments) == 1
    assert "the checkpoint is there already" in capsys.readouterr().err


def test_the_moving_average_is_that_of_the_fp32_copies(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the first average on, which has the initial weights; no checkpoint has those."""
    assert average_checkpoints.main([f"--load-dir={saved}", f"--save-dir={tmp_path}", "--ema"]) == 0
    assert "the moving average at iteration 4" in capsys.readouterr().out
    models, found = [open_model(saved, iteration=number) for number in (1, 2, 3, 4)], open_model(tmp_path)
    for shape in found.table:
        average = models[0].optimizer_tensor(shape, "ema")
        assert average is not None
        exact = average.double()
        for model in models[1:]:
            exact = DECAY * exact + (1 - DECAY) * model.full_tensor(shape, precise=True).double()
        torch.testing.assert_close(found.full_tensor(shape), exact.bfloat16(), rtol=2**-7, atol=0)


def test_a_checkpoint_without_a_moving_average(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert average_checkpoints.main([f"--load-dir={saved}", f"--save-dir={tmp_path / 'mean'}", "--last=2"]) == 0
    arguments = [f"--load-dir={tmp_path / 'mean'}", f"--save-dir={tmp_path / 'ema'}", "--ema"]
    assert average_checkpoints.main(arguments) == 1
    assert "no moving average of its weights" in capsys.readouterr().err


def test_a_mean_of_earlier_checkpoints(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--load_dir={saved}", f"--save_dir={tmp_path}", "--last=2", "--iteration=3"]
    assert average_checkpoints.main(arguments) == 0
    assert "the mean of iterations 2, 3" in capsys.readouterr().out
    assert layout.iterations(tmp_path) == [3]


@pytest.mark.parametrize(
    ("flags", "reported"),
    [
        (["--last=1"], "last = 1: a mean needs two checkpoints"),
        (["--last=5"], "4 checkpoints are there: 1, 2, 3, 4"),
        (["--last=3", "--iteration=2"], "2 checkpoints are there: 1, 2"),
    ],
)
def test_too_few_checkpoints(
    flags: list[str], reported: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert average_checkpoints.main([f"--load-dir={saved}", f"--save-dir={tmp_path}", *flags]) == 2
    assert reported in capsys.readouterr().err
    assert layout.iterations(tmp_path) == []


@pytest.fixture(scope="module")
def branched(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder after the run went on from iteration 1 and saved 2 and 3 anew; 4 is of the first run."""
    folder = tmp_path_factory.mktemp("branched")
    shutil.copytree(saved, folder / "save")
    again = {"train_iters": 3, "iteration": 1, "override_lr_scheduler": True, "data_path": str(saved.parent / "text")}
    run(2, folder, **{**SETTINGS, **again}, load=str(folder / "save"), save=str(folder / "save"))
    return folder / "save"


@pytest.mark.parametrize(
    ("flags", "reported"),
    [
        (["--last=2"], "the mean of iterations 2, 3\nleft out: 4, from which iteration 3 was not trained\n"),
        (["--last=3"], "the mean of iterations 1, 2, 3\nleft out: 4, from which iteration 3 was not trained\n"),
        (["--last=2", "--iteration=3"], "the mean of iterations 2, 3\n"),
        (["--last=2", "--iteration=4"], "the mean of iterations 1, 4\nleft out: 2, 3, from which iteration 4 was"),
    ],
)
def test_a_mean_is_of_one_history(
    flags: list[str], reported: str, branched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that went on from an earlier iteration leaves later checkpoints of the first one in the folder."""
    assert average_checkpoints.main([f"--load-dir={branched}", f"--save-dir={tmp_path}", *flags]) == 0
    assert reported in capsys.readouterr().out


def test_too_few_checkpoints_of_one_history(branched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert average_checkpoints.main([f"--load-dir={branched}", f"--save-dir={tmp_path}", "--last=4"]) == 2
    assert "3 checkpoints are there: 1, 2, 3, and 4 of another history" in capsys.readouterr().err


def test_checkpoints_of_earlier_versions(branched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They do not say what they were trained from: all before the newest, which `latest` names."""
    shutil.copytree(branched, tmp_path / "save")
    for number in (1, 2, 3, 4):
        path = tmp_path / "save" / f"global_step{number}" / layout.RUN
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in facts.items() if key not in ("process", "history")}))
    assert chosen_iterations(tmp_path / "save", 3, None) == Chosen([1, 2, 3], [4])
    assert chosen_iterations(tmp_path / "save", 3, 4) == Chosen([2, 3, 4], [])
    assert ancestors(tmp_path / "save", 4) == [1, 2, 3]
