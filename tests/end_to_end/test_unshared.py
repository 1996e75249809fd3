"""Two ranks that play two hosts without a shared file system: names, folders, data and checkpoints of their own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.save import commit
from megatron.errors import ConfigError, RunError
from megatron.metrics.sinks.jsonl import read_metrics
from tests.end_to_end.runs import BASE, make_dataset, run, run_rank, series
from tests.multi_rank import run_distributed

SETTINGS: dict[str, Any] = {
    "data_path": "data/text",
    "save": "save",
    "load": "save",
    "log_dir": "logs",
    "use_shared_fs": False,
    "checkpoint_factor": 5,
    "train_iters": 10,
    "zero_optimization": {"stage": 1},
}


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A folder with the data, and the losses of a run that shares it."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "data").mkdir()
    dataset = make_dataset(folder / "data")
    for cache in (folder / "data").glob("*.npy"):
        cache.unlink()
    records = run(2, folder, data_path=dataset, train_iters=10, zero_optimization={"stage": 1})
    for cache in (folder / "data").glob("*.npy"):
        cache.unlink()
    return folder / "data", series(records, "train/lm_loss")


@pytest.fixture
def hosts(complete: tuple[Path, list[float]], tmp_path: Path) -> Path:
    for host in ("host0", "host1"):
        shutil.copytree(complete[0], tmp_path / host / "data")
    return tmp_path


def on_host(rank: int, world_size: int, root: Path, settings: dict[str, Any]) -> str:
    """A worker on a host of its own; returns the error that ended it, if one did."""
    os.environ |= {"SLURMD_NODENAME": f"host{rank}", "LOCAL_RANK": "0"}
    os.chdir(root / f"host{rank}")
    commit._PATIENCE = 0.5  # [s] for what another host writes to appear
    try:
        run_rank(rank, world_size, {**BASE, **SETTINGS, **settings})
    except (ConfigError, RunError) as error:
        return str(error)
    return ""


def train(root: Path, **settings: Any) -> list[str]:
    return run_distributed(on_host, 2, root, settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lost", ["host0", pytest.param("host1", marks=pytest.mark.long)])
def test_every_host_has_the_full_and_either_may_be_lost(
    lost: str, hosts: Path, complete: tuple[Path, list[float]]
) -> None:
    assert train(hosts, exit_interval=5) == ["", ""]
    first, second = (contents(hosts / host / "save") for host in ("host0", "host1"))
    assert first.keys() - {name for name in first if name.startswith("logs")} == second.keys()
    assert all(first[name] == second[name] for name in second)
    assert {"global_step5/state/rank_00000.pt", "global_step5/state/rank_00001.pt"} <= second.keys()
    assert all(list((hosts / host / "data").glob("*.npy")) for host in ("host0", "host1"))
    shutil.rmtree(hosts / lost / "save")
    assert train(hosts, keep_last_n_checkpoints=1) == ["", ""]
    records = read_metrics(hosts / "host0" / "logs")
    assert series(records, "train/lm_loss") == complete[1]
    for host in ("host0", "host1"):
        retained = {path.name for path in (hosts / host / "save").iterdir() if path.is_dir()}
        assert retained == {"global_step5", "global_step10"}, "the one that was started from stays"
        assert (hosts / host / "save" / "latest").read_text() == "global_step10"


def test_a_save_that_cannot_leave_a_host_is_refused_before_the_first_step(hosts: Path) -> None:
    for said in train(hosts, checkpoint_async=True):
        assert said.startswith("checkpoint_async = True: the hosts share no folder")
    assert not (hosts / "host0" / "logs" / "metrics.jsonl").read_text()
    said = train(hosts, use_shared_fs=True, load=None)
    assert all(said) and any("set use_shared_fs: false" in each for each in said), said


def in_one_folder(rank: int, world_size: int, root: Path, settings: dict[str, Any]) -> None:
    os.environ |= {"SLURMD_NODENAME": f"host{rank}", "LOCAL_RANK": "0"}
    os.chdir(root / "host0")
    run_rank(rank, world_size, {**BASE, **SETTINGS, **settings})


def test_hosts_that_do_share_the_folder_write_it_once(hosts: Path, complete: tuple[Path, list[float]]) -> None:
    run_distributed(in_one_folder, 2, hosts, {"exit_interval": 5})
    run_distributed(in_one_folder, 2, hosts, {})
    assert series(read_metrics(hosts / "host0" / "logs"), "train/lm_loss") == complete[1]


def test_damage_on_one_host_is_reported(hosts: Path) -> None:
    assert train(hosts, exit_interval=5) == ["", ""]
    file = hosts / "host1" / "save" / "global_step5" / "state" / "rank_00000.pt"
    file.write_bytes(file.read_bytes()[:-1])
    for said in train(hosts):
        assert "rank_00000.pt" in said and "were written" in said


def test_a_folder_that_cannot_be_made_on_one_host_is_reported_on_all(hosts: Path) -> None:
    (hosts / "host1" / "save").write_text("a file where the folder should be")
    reported = "save = 'save': checkpoints cannot be written there: "
    assert all(reported in said and "File exists on " in said for said in train(hosts, load=None))
