"""Writing while something else goes on: copies, failures and the files of other ranks."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.format import files, layout
from megatron.checkpoint.load import find
from megatron.checkpoint.save.async_writer import BackgroundWriter
from megatron.checkpoint.save.commit import make_room, publish
from megatron.checkpoint.save.snapshot import Snapshot
from megatron.errors import RunError
from tests.checkpoint.saved import snapshot


def test_what_is_written_is_what_was_there_at_the_start(tmp_path: Path) -> None:
    values = torch.arange(5.0)
    held = Snapshot({"a.pt": values.clone}, {}).held()
    values.zero_()
    assert [each.path.name for each in held.write(tmp_path)] == ["a.pt"]
    assert torch.equal(files.read_tensors(tmp_path / "a.pt"), torch.arange(5.0))


def test_it_returns_at_once_and_completes_when_all_ranks_have_written(tmp_path: Path) -> None:
    partial, final = layout.partial_directory(tmp_path, 4), layout.step_directory(tmp_path, 4)
    make_room(partial)
    first, second = BackgroundWriter(0, 2, 30), BackgroundWriter(1, 2, 30)
    first.start(partial, snapshot(4).held(), lambda written: publish(partial, final, written))
    first.check()
    assert not final.exists()
    second.start(partial, Snapshot({layout.rng_file(1): lambda: torch.ones(2)}), lambda written: None)
    second.wait()
    first.wait()
    assert find.find_intact(tmp_path, None, "error") == final
    assert torch.load(final / layout.rng_file(1), weights_only=True).sum() == 2
    assert torch.serialization.get_crc32_options(), "whoever saves next has his checksums"
    assert (final / layout.rng_file(1)).is_file()
    assert not list(final.rglob("written_*"))


def test_the_folder_may_get_its_name_as_soon_as_all_have_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank sees the second one's list, and completes the checkpoint, before the second does anything more."""
    partial, final = layout.partial_directory(tmp_path, 4), layout.step_directory(tmp_path, 4)
    make_room(partial)
    replace = os.replace

    def replaced_and_completed(source: Path, target: Path) -> None:
        replace(source, target)
        if target == partial / layout.written_file(1):
            partial.rename(final)

    monkeypatch.setattr(os, "replace", replaced_and_completed)
    second = BackgroundWriter(1, 2, 30)
    second.start(partial, Snapshot({layout.rng_file(1): lambda: torch.ones(2)}), lambda written: None)
    second.wait()
    assert (final / layout.rng_file(1)).is_file()


def test_a_failure_is_reported_by_the_next_look(tmp_path: Path) -> None:
    partial = layout.partial_directory(tmp_path, 4)
    make_room(partial)
    (partial / "state" / "rng_00000.pt").mkdir()
    writer = BackgroundWriter(0, 1, 30)
    writer.start(partial, Snapshot({layout.rng_file(0): lambda: torch.ones(2)}), lambda written: None)
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()
    with pytest.raises(
        RunError, match=r"writing .*global_step4\.partial failed: .*Is a directory.*; the checkpoints written"
    ):
        writer.check()
    writer.check()
    assert not partial.exists()


def test_a_rank_whose_files_do_not_appear_is_named(tmp_path: Path) -> None:
    partial = layout.partial_directory(tmp_path, 4)
    make_room(partial)
    writer = BackgroundWriter(0, 2, 0.2)
    writer.start(partial, snapshot(4), lambda written: None)
    with pytest.raises(RunError, match=r"rank 1 has not written its part .* file system that all nodes share"):
        writer.wait()


def test_after_an_error_elsewhere_a_save_is_completed_if_it_can_be(tmp_path: Path) -> None:
    """Its thread has ended then: one inside torch aborts a process whose interpreter ends."""
    partial, final = layout.partial_directory(tmp_path, 4), layout.step_directory(tmp_path, 4)
    make_room(partial)
    writer, going = BackgroundWriter(0, 1, 30), threading.Event()
    slow = Snapshot({layout.rng_file(0): lambda: torch.ones(2) if going.wait(20) else torch.zeros(2)}, {})
    writer.start(partial, slow, lambda written: publish(partial, final, written))
    threading.Timer(0.5, going.set).start()
    writer.abandon()
    assert not writer.busy
    assert torch.load(final / layout.rng_file(0), weights_only=True).sum() == 2


def test_after_an_error_elsewhere_other_ranks_are_not_waited_for_long(tmp_path: Path) -> None:
    partial = layout.partial_directory(tmp_path, 4)
    make_room(partial)
    writer = BackgroundWriter(0, 2, 600)
    writer.start(partial, snapshot(4).held(), lambda written: None)
    writer.abandon()
    assert not writer.busy and not partial.exists()
