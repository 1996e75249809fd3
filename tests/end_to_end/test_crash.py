"""Full disks and damage: what was saved stays usable, and the run goes on as if nothing had happened."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import BASE, run, run_rank, series
from tests.multi_rank import RankFailedError, run_distributed


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
