"""Which checkpoints of a folder one was trained from, when runs went on from earlier iterations."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from megatron.checkpoint.format import layout
from megatron.checkpoint.format.history import History, ancestors
from megatron.checkpoint.load import find
from tests.checkpoint.saved import save


def train(folder: Path, loaded: int | None, *saved: int) -> None:
    """What a process leaves that loads one checkpoint and saves others."""
    history = History(None if loaded is None else layout.step_directory(folder, loaded))
    for iteration in saved:
        run = layout.step_directory(folder, iteration) / layout.RUN
        run.parent.mkdir(parents=True, exist_ok=True)
        run.write_text(json.dumps({"counters": {}, **history.facts(iteration)}))


def test_a_checkpoint_that_was_replaced_is_another(tmp_path: Path) -> None:
    train(tmp_path, None, 2, 4)
    train(tmp_path, 4, 6, 8)
    assert ancestors(tmp_path, 8) == [2, 4, 6]
    train(tmp_path, 4, 7, 9)  # beside the first: 6 and 8 stay
    assert ancestors(tmp_path, 9) == [2, 4, 7]
    train(tmp_path, 2, 4, 10)  # in place of 4, which 6 to 9 were trained from
    assert [ancestors(tmp_path, number) for number in (10, 9, 8)] == [[2, 4], [2, 7], [2, 6]]
    train(tmp_path, None, 3)
    assert ancestors(tmp_path, 3) == []


def test_checkpoints_of_another_folder_and_of_earlier_versions(tmp_path: Path) -> None:
    for iteration in (1, 2, 5):
        layout.step_directory(tmp_path, iteration).mkdir()
    train(tmp_path, 2, 3, 4)
    assert ancestors(tmp_path, 5) == [1, 2, 3, 4], "it does not say"
    assert ancestors(tmp_path, 4) == [1, 2, 3]
    (tmp_path / "other").mkdir()
    history = History(layout.step_directory(tmp_path, 4))
    assert [iteration for iteration, _ in history.facts(6)["history"]] == [2, 3, 4]
    train(tmp_path / "other", None, 4, 6)
    assert ancestors(tmp_path / "other", 6) == [4]


@pytest.mark.parametrize(("history", "other"), [([], True), ([[1, None]], False), ("torn", False)])
def test_the_one_before_may_be_of_another_run(
    history: object, other: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, newest = save(tmp_path, 1), save(tmp_path, 2)
    (newest / layout.RUN).write_text(json.dumps({"history": history}))  # the manifest does not have it
    with caplog.at_level(logging.WARNING):
        assert find.find_intact(tmp_path, None, find.PREVIOUS) == first
    assert f"going on from {first} instead" in caplog.text
    assert ("of another run" in caplog.text) == other
