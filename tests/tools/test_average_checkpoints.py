"""The tool that averages the last checkpoints of a run, as a user calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.checkpoint.format import layout
from megatron.checkpoint.load.stored_model import open_model
from tests.end_to_end.runs import make_dataset, run
from tools import average_checkpoints, inspect_checkpoint

STEPS, DECAY = 4, 0.6


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A save folder with the checkpoints of four steps in bfloat16, on two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("saved")
    settings = {"data_path": make_dataset(folder), "train_iters": STEPS, "eval_iters": 0, "checkpoint_factor": 1}
    settings |= {"precision": "bfloat16", "num_layers": 1, "zero_optimization": {"stage": 1}, "model_parallel_size": 2}
    settings |= {"ema_decay": DECAY}
    run(2, folder, **settings, save=str(folder / "save"))
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
