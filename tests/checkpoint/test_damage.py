"""Damaged checkpoints are reported by name, the one before is offered or taken, and code in a pickle never runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.format import layout
from megatron.checkpoint.format.weight_shards import WeightFiles
from megatron.checkpoint.load import find
from megatron.errors import ConfigError, RunError
from tests.checkpoint.saved import save


class Attack:
    """A pickle that leaves a trace when it is executed."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def truncate(newest: Path) -> None:
    path = newest / layout.model_file(0)
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(newest: Path) -> None:
    path = newest / layout.slice_file(0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def lose_a_shard(newest: Path) -> None:
    (newest / layout.slice_file(0)).unlink()


def point_elsewhere(newest: Path) -> None:
    (newest.parent / layout.LATEST).write_text("global_step99")


def add_a_rank(newest: Path) -> None:
    (newest / layout.slice_file(7)).write_bytes((newest / layout.slice_file(0)).read_bytes())


def age(newest: Path) -> None:
    path = newest / layout.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 0}))


def tear_the_manifest(newest: Path) -> None:
    path = newest / layout.MANIFEST
    path.write_text(path.read_text()[:50])


def lose_the_manifest(newest: Path) -> None:
    (newest / layout.MANIFEST).unlink()


def empty(newest: Path) -> None:
    for path in sorted(newest.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, r"mp_rank_00_model_states\.pt: \d+ bytes where \d+ were written"),
    "bit flipped": (flip_a_bit, r"rank_00000\.pt: its content changed after it was written"),
    "missing shard": (lose_a_shard, r"rank_00000\.pt: the file is missing"),
    "wrong latest": (point_elsewhere, "latest: names a checkpoint that is not there"),
    "extra rank": (add_a_rank, r"rank_00007\.pt: this file does not belong to the checkpoint"),
    "old version": (age, r"manifest\.json: version 0 is not one that can be read"),
    "torn manifest": (tear_the_manifest, r"manifest\.json: the file cannot be read"),
    "lost manifest": (lose_the_manifest, r"manifest\.json: the file cannot be read"),
    "empty": (empty, "global_step2: no weight files"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_reported_and_the_one_before_is_taken(name: str, tmp_path: Path) -> None:
    damage, reported = DAMAGES[name]
    first, newest = save(tmp_path, 1), save(tmp_path, 2)
    assert find.find_intact(tmp_path, None, "error") == newest
    damage(newest)
    with pytest.raises(RunError, match=reported) as caught:
        find.find_intact(tmp_path, None, "error")
    assert "choose one with --iteration: 1" in str(caught.value)
    assert "load_fallback: previous" in str(caught.value)
    taken = find.find_intact(tmp_path, None, "previous")
    assert taken == (newest if name == "wrong latest" else first)


def test_two_damaged_in_a_row(tmp_path: Path) -> None:
    saved = [save(tmp_path, iteration) for iteration in (1, 2, 3)]
    truncate(saved[2])
    flip_a_bit(saved[1])
    assert find.find_intact(tmp_path, None, "previous") == saved[0]
    lose_a_shard(saved[0])
    with pytest.raises(RunError, match="global_step1"):
        find.find_intact(tmp_path, None, "previous")


def test_what_was_asked_for_by_number_is_not_replaced_by_a_newer_one(tmp_path: Path) -> None:
    saved = [save(tmp_path, iteration) for iteration in (1, 2, 3)]
    truncate(saved[1])
    assert find.find_intact(tmp_path, 2, "previous") == saved[0]
    with pytest.raises(ConfigError, match="choose one with --iteration: 1, 2, 3"):
        find.find_intact(tmp_path, 4, "previous")


def test_a_foreign_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    directory = tmp_path / "global_step5"
    directory.mkdir()
    torch.save(
        {"module": {"sequential.0.word_embeddings.weight": Attack(tmp_path / "trace")}},
        directory / layout.model_file(0),
    )
    assert find.find_intact(tmp_path, None, "error") == directory
    with pytest.raises(RunError, match=r"mp_rank_00_model_states\.pt.*cannot be read"):
        WeightFiles.open(directory).keys()
    assert not (tmp_path / "trace").exists()


def test_an_absent_folder_holds_nothing(tmp_path: Path) -> None:
    assert find.find_intact(tmp_path / "nothing", None, "error") is None
