"""Loggers: which ranks log, and the format of a line."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from megatron.log import ROOT, configure, get_logger


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger(ROOT)
    before = (list(root.handlers), root.level, root.propagate)
    yield
    root.handlers, root.level, root.propagate = before


def _world(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))


def test_a_lone_process_prints_plain_lines_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    _world(monkeypatch, 0, 1)
    configure()
    configure()
    get_logger("megatron.data.dataset.builder").info("%d documents", 3)
    assert re.fullmatch(r"\d\d:\d\d:\d\d 3 documents\n", capsys.readouterr().err)


def test_every_line_names_its_rank_and_other_ranks_only_warn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _world(monkeypatch, 2, 4)
    configure("info")
    log = get_logger("megatron.engine")
    log.info("not logged")
    log.warning("two\nlines")
    lines = capsys.readouterr().err.splitlines()
    assert [line[9:] for line in lines] == ["[rank 2] warning: two", "[rank 2] warning: lines"]


def test_the_level_comes_from_the_environment_and_debug_reaches_every_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _world(monkeypatch, 0, 2)
    monkeypatch.setenv("LOGLEVEL", "ERROR")
    configure()
    get_logger("megatron.x").warning("not logged")
    _world(monkeypatch, 1, 2)
    configure("DEBUG")
    get_logger("tool").debug("logged")
    assert [line[9:] for line in capsys.readouterr().err.splitlines()] == ["[rank 1] debug: logged"]


def test_a_traceback_is_part_of_the_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    _world(monkeypatch, 1, 2)
    configure()
    try:
        raise ValueError("broken")
    except ValueError:
        get_logger("megatron.x").exception("it failed")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("error: it failed") and lines[-1].endswith("ValueError: broken")
    assert all("[rank 1]" in line for line in lines)
