"""The comparison of two commits finds what differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config import Resources, resolve
from tests.compatibility.compare import changed_files, difference
from tests.compatibility.settings import BASE, RESUMED, SETTINGS

RECORDS = [{"iteration": 1, "train/lm_loss": 6.25}, {"iteration": 2, "train/lm_loss": 6.125}]


def test_equal_runs_have_no_difference() -> None:
    assert difference(RECORDS, [dict(record) for record in RECORDS]) is None


def test_one_bit_is_a_difference() -> None:
    changed = [RECORDS[0], {**RECORDS[1], "train/lm_loss": 6.1250000000000009}]
    assert "6.125000000000001" in (difference(RECORDS, changed) or "")
    assert difference(RECORDS, RECORDS[:1]) == "2 records, now 1"


def test_runs_without_losses_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="no loss"):
        difference([{"iteration": 1}], [{"iteration": 1}])


def test_files_are_compared_by_name_and_bytes(tmp_path: Path) -> None:
    for folder, text in (("old", "a"), ("new", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same").write_text("x")
        (tmp_path / folder / "other").write_text(text)
    assert changed_files(tmp_path / "old", tmp_path / "new") == ["other"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError, match="holds no file"):
        changed_files(tmp_path / "empty", tmp_path / "old")


@pytest.mark.parametrize("name", SETTINGS)
def test_every_configuration_is_accepted(name: str) -> None:
    resolve([], {**BASE, **SETTINGS[name].keys, "data_path": "corpus"}, Resources(SETTINGS[name].ranks))
    assert RESUMED in SETTINGS


def test_a_stored_configuration_may_gain_keys_and_nothing_else(tmp_path: Path) -> None:
    for folder, resolved, sums in (
        ("old", '{"a": 1}', "1"),
        ("new", '{"a": 1, "b": 2}', "2"),
        ("other", '{"a": 2, "b": 2}', "3"),
    ):
        (tmp_path / folder / "configs").mkdir(parents=True)
        (tmp_path / folder / "configs/resolved.json").write_text(resolved)
        (tmp_path / folder / "manifest.json").write_text(sums)
    assert changed_files(tmp_path / "old", tmp_path / "new") == []
    assert changed_files(tmp_path / "old", tmp_path / "other") == ["configs/resolved.json", "manifest.json"]
    assert changed_files(tmp_path / "new", tmp_path / "old") == ["configs/resolved.json", "manifest.json"]
