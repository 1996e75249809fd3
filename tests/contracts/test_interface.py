"""What other programs and earlier runs rely on stays: see interface.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.interface import interface

LISTED: dict[str, Any] = json.loads(Path(__file__).with_name("interface.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def now() -> dict[str, Any]:
    return interface()


@pytest.mark.parametrize("kind", ["files", "flags", "metrics", "exit_codes", "keys"])
def test_no_name_is_gone(kind: str, now: dict[str, Any]) -> None:
    assert len(LISTED[kind]) >= 3
    assert sorted(set(LISTED[kind]) - set(now[kind])) == []


def test_parameters_have_the_names_and_shapes_of_before(now: dict[str, Any]) -> None:
    assert len(LISTED["parameters"]) > 100
    assert {key: now["parameters"].get(key) for key in LISTED["parameters"]} == LISTED["parameters"]


def test_important_names_are_listed() -> None:
    assert {"manifest.json", "metrics.jsonl", "state/answers.pt", "{}_skipped.jsonl"} <= set(LISTED["files"])
    assert {"--input", "--output-prefix", "--iteration", "--input-dir"} <= set(LISTED["flags"])
    assert {"train/lm_loss", "validation/lm_loss", "runtime/iteration_time"} <= set(LISTED["metrics"])
    assert {2, 130} <= set(LISTED["exit_codes"])
