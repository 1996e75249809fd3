"""A file that is written atomically: the old content until the new one is complete, and nothing else in the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron import atomic
from megatron.atomic import atomic_path, atomic_writer, open_lines, write_atomic


def test_the_old_content_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file"
    write_atomic(path, "old\r\né\n")
    with atomic_writer(path) as file:
        file.write(b"ne")
        file.flush()
        assert path.read_bytes() == "old\r\né\n".encode()
        file.write(b"w")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise ValueError("cut")

    with pytest.raises(ValueError, match="cut"):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("durable", [False, True])
def test_what_is_durable_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    path, steps = tmp_path / "file", []
    sync, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        steps.append("folder" if os.path.samestat(os.fstat(handle), tmp_path.stat()) else "content")
        sync(handle)

    def rename(source: Path, target: Path) -> None:
        assert source.parent == target.parent, "a rename is atomic only inside a file system"
        steps.append("name")
        replace(source, target)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    monkeypatch.setattr(atomic.os, "replace", rename)
    write_atomic(path, "text", durable=durable)
    assert steps == (["content", "name", "folder"] if durable else ["name"])


def test_a_line_that_was_left_incomplete_is_ended_before_the_next(tmp_path):
    path = tmp_path / "lines"
    for text in ("one\n", "tw", "three\n"):
        with open_lines(path) as file:
            file.write(text)
    assert path.read_text() == "one\ntw\nthree\n"
