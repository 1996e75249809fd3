"""The folder of a run: what cannot be written and what another run holds is refused before the first step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.checkpoint.format import layout
from megatron.checkpoint.load import find
from megatron.checkpoint.remote.s3_client import Bucket
from megatron.checkpoint.save.folder_check import LOCK, check_writable, claim, sole_writer
from megatron.config.schema.checkpoint import CheckpointSection
from megatron.distributed.process_group import all_gather_items
from megatron.errors import ConfigError
from tests.checkpoint.saved import save
from tests.multi_rank import RankFailedError, run_distributed


def section(folder: Path, **keys: object) -> CheckpointSection:
    return CheckpointSection.model_validate({"save": str(folder), **keys})


def test_a_folder_that_is_new_or_empty_is_free(tmp_path: Path) -> None:
    claim(section(tmp_path / "new"), None, leads=True)
    claim(section(tmp_path), None, leads=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("started", ["at iteration 0", "from another folder"])
def test_checkpoints_of_another_run_are_refused_and_stay(started: str, tmp_path: Path) -> None:
    held = tmp_path / "held"
    loaded = save(tmp_path / "base", 7) if started != "at iteration 0" else None
    before = {path: path.read_bytes() for step in (5, 10) for path in save(held, step).rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"iterations 5, 10.*set load to this folder.*save_overwrite: true") as caught:
        claim(section(held), loaded, leads=True)
    assert (caught.value.issues[0].key, caught.value.issues[0].value) == ("save", str(held))
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_goes_on_in_its_own_folder_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 10):
        save(tmp_path / "run", step)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for name in ("run", "./run/", "link", str(tmp_path / "link")):
        claim(section(Path(name)), layout.step_directory(tmp_path / "run", 10), leads=True)
    assert caplog.text == ""
    claim(section(Path("run")), layout.step_directory(tmp_path / "run", 5), leads=True)
    assert "also holds iteration 10, from beyond this one" in caplog.text


def test_an_exported_model_inside_the_folder_is_no_checkpoint_of_it(tmp_path: Path) -> None:
    """Iterations count from 0 then, and would replace those that are there."""
    save(tmp_path, 5)
    (tmp_path / "exported").mkdir()
    with pytest.raises(ConfigError, match="iteration 5"):
        claim(section(tmp_path), tmp_path / "exported", leads=True)


def test_a_new_start_by_request_moves_them_aside(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    (tmp_path / "logs").mkdir()
    claim(section(tmp_path, save_overwrite=True), None, leads=True)
    assert layout.iterations(tmp_path) == []
    assert find.candidates(tmp_path, None) == []
    (aside,) = tmp_path.glob("replaced-*")
    assert find.find_intact(aside, None, "error") == aside / "global_step10"
    assert (tmp_path / "logs").is_dir()


def test_copies_of_another_run_in_the_bucket_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        def folders(self) -> list[str]:
            return ["global_step4", "global_step8", "other"]

        def keys(self, prefix: str) -> list[str]:
            return [prefix] if prefix != "global_step8/manifest.json" else []  # that copy is not complete

    monkeypatch.setattr(Bucket, "open", lambda *_: Held())
    with pytest.raises(ConfigError, match=r"copies of another run's checkpoints \(iteration 4\)"):
        claim(section(tmp_path, s3_path="s3://bucket/run"), None, leads=True)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"save.*cannot be written there: Not a directory"):
        check_writable(str(tmp_path / "file" / "run"), leads=True)


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "a" / "b"), leads=True)
    assert os.listdir(tmp_path / "a" / "b") == []


def refused_rank(rank: int, world_size: int, folder: str) -> None:
    check_writable(folder, leads=rank == 0)


def test_every_rank_hears_of_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RankFailedError, match="Not a directory") as caught:
        run_distributed(refused_rank, 2, str(tmp_path / "file" / "run"))
    assert len(re.findall("cannot be written there", str(caught.value))) >= 1


HOLDER = """
import sys
from megatron.checkpoint.save.folder_check import sole_writer
with sole_writer(sys.argv[1], leads=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_does_not_save_into_the_folder_of_a_living_one(tmp_path: Path) -> None:
    save_folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(save_folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert any("held" in line for line in holder.stdout)
        expected = pytest.raises(ConfigError, match=r"save = .*run'?: another run is saving there now; wait until it")
        with expected, sole_writer(str(save_folder), leads=True):
            raise AssertionError("two runs hold one folder")
        holder.kill()
    assert (save_folder / LOCK).exists(), "it was killed, and left its file"
    with sole_writer(str(save_folder), leads=True):
        assert (save_folder / LOCK).exists()
    assert list(save_folder.iterdir()) == []


def test_a_lock_that_cannot_be_taken_is_reported_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(RankFailedError, match=r"its file \.saving cannot be locked: Is a directory") as caught:
        run_distributed(second_run, 2, str(tmp_path))
    assert len(re.findall("cannot be locked", str(caught.value))) >= 1


def second_run(rank: int, world_size: int, folder: str) -> None:
    with sole_writer(folder, leads=rank == 0):
        pass


def shared(rank: int, world_size: int, folder: str) -> None:
    with sole_writer(folder, leads=True):
        assert (Path(folder) / LOCK).exists()
        all_gather_items([rank])


def test_hosts_of_one_run_may_share_the_folder(tmp_path: Path) -> None:
    run_distributed(shared, 3, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_every_rank_of_a_second_run_hears_of_it(tmp_path: Path) -> None:
    expected = pytest.raises(RankFailedError, match="another run is saving there now")
    with sole_writer(str(tmp_path), leads=True), expected:
        run_distributed(second_run, 2, str(tmp_path))
    run_distributed(second_run, 2, str(tmp_path))
