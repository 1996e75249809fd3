"""Names of checkpoints: kept, given, taken away and given back; kills at any moment leave a whole one."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.format import files, layout
from megatron.checkpoint.load import find
from megatron.checkpoint.save import commit
from megatron.checkpoint.save.commit import make_room, require_shared, retain
from megatron.errors import RunError
from tests.checkpoint.saved import save
from tests.multi_rank import run_distributed


def test_the_last_ones_are_retained(tmp_path: Path) -> None:
    for iteration in range(1, 6):
        save(tmp_path, iteration, keep=2)
    assert layout.iterations(tmp_path) == [4, 5]


def test_a_folder_with_a_padded_number_is_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "global_step0001").mkdir()
    for iteration in range(2, 5):
        save(tmp_path, iteration, keep=2)
    assert layout.iterations(tmp_path) == [3, 4]
    assert (tmp_path / "global_step0001").is_dir()


def test_the_one_that_was_loaded_stays(tmp_path: Path) -> None:
    loaded = save(tmp_path, 1)
    for iteration in (2, 3, 4):
        save(tmp_path, iteration)
    retain(Path(f"{tmp_path}/"), 1, newest=4, loaded=Path(f"{loaded}/"))
    assert layout.iterations(tmp_path) == [1, 4]


def test_iterations_that_were_asked_for_by_number_stay_and_do_not_count(tmp_path: Path) -> None:
    for iteration in range(8):
        save(tmp_path, iteration)
        retain(tmp_path, 2, newest=iteration, loaded=None, spared=(0, 1, 4))
    assert layout.iterations(tmp_path) == [0, 1, 4, 6, 7]


def test_an_earlier_start_removes_neither_its_own_nor_later_ones(tmp_path: Path) -> None:
    """A run that went back to iteration 1 saves 2 beside the 8 and 9 of the run before."""
    for iteration in (1, 8, 9):
        save(tmp_path, iteration)
    save(tmp_path, 2, keep=1)
    assert layout.iterations(tmp_path) == [2, 8, 9]
    assert (tmp_path / layout.LATEST).read_text() == "global_step2"
    assert find.find_intact(tmp_path, None, "error") == tmp_path / "global_step2"


def test_a_checkpoint_between_two_names_gets_its_own_back(tmp_path: Path) -> None:
    final = save(tmp_path, 3)
    final.rename(tmp_path / "global_step3.replaced.partial")
    with pytest.raises(RunError, match="names a checkpoint that is not there"):
        find.find_intact(tmp_path, None, "error")
    assert find.find_intact(tmp_path, None, "error", repair=True) == final
    final.rename(tmp_path / "global_step3.replaced.partial")
    make_room(layout.partial_directory(tmp_path, 4))
    assert layout.iterations(tmp_path) == [3]


def test_saving_the_same_iteration_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    assert find.find_intact(tmp_path, None, "error") == save(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["global_step3"]


def save_until_killed(folder: Path, first: int, acknowledged: int) -> None:
    """Saves iteration after iteration, reporting each through a pipe when it is complete; in a fork."""
    iteration = first
    while True:
        save(folder, iteration, keep=2)
        if iteration % 3 == 0:
            save(folder, iteration, keep=2)  # once more under a name that is taken
        os.write(acknowledged, iteration.to_bytes(4, "little"))
        iteration += 1


def kill_a_saver(folder: Path, first: int, moment: float) -> int:
    """Forks a saver, kills it after that many seconds; the last iteration that it called complete, or first - 1."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_until_killed(folder, first, writer)
        finally:
            os._exit(1)
    os.close(writer)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    reported = b"".join(iter(lambda: os.read(reader, 4096), b""))
    os.close(reader)
    return int.from_bytes(reported[-4:], "little") if reported else first - 1


def tear(folder: Path, chance: random.Random) -> None:
    """What was not complete was perhaps not on the disk either: a power cut leaves any part of it."""
    for path in folder.glob("global_step*.partial/**/*"):
        if path.is_file() and not (path.parent / layout.MANIFEST).exists() and chance.random() < 0.5:
            os.truncate(path, chance.randrange(path.stat().st_size + 1))


def survive(folder: Path, kills: int) -> None:
    chance = random.Random(kills)
    done = layout.iteration_of(save(folder, 1)) or 0
    for _ in range(kills):
        done = max(done, kill_a_saver(folder, done + 1, chance.uniform(0, 0.08)))
        tear(folder, chance)
        found = find.find_intact(folder, None, "error", repair=True)
        assert found is not None
        iteration = layout.iteration_of(found)
        assert iteration is not None
        assert iteration >= done, "a complete checkpoint was lost"
        module = files.read_tensors(found / layout.model_file(0))["module"]
        assert all(torch.equal(tensor, torch.full_like(tensor, iteration)) for tensor in module.values())
        done = iteration


def test_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    survive(tmp_path, 25)


@pytest.mark.long
def test_many_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    survive(tmp_path, 180)


def folder_of_its_own(rank: int, world_size: int, root: str) -> str:
    """Each rank has another folder under the same name, as on nodes without a shared file system."""
    commit._PATIENCE = 0.5  # [s] for what another node writes to appear
    try:
        require_shared(Path(root) / f"node{rank}", rank)
    except RunError as error:
        return str(error)
    return ""


def one_folder(rank: int, world_size: int, root: str) -> None:
    require_shared(Path(root) / "save", rank)


def test_nodes_that_do_not_share_the_folder_are_reported_before_training(tmp_path: Path) -> None:
    run_distributed(one_folder, 2, str(tmp_path))
    assert list((tmp_path / "save").iterdir()) == []
    first, second = run_distributed(folder_of_its_own, 2, str(tmp_path))
    assert "does not see what rank 0 writes there; save to a folder on a file system that all nodes share" in second
    assert "another rank failed" in first
