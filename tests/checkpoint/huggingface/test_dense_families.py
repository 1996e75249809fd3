"""The dense families of newer models train, generate and run on several ranks as they do in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.huggingface.family_runs import LAYOUTS, Found, compare_greedy_text, compare_steps, theirs
from tests.checkpoint.huggingface.models import DENSE


@pytest.fixture(scope="module")
def expected() -> dict[str, Found]:
    return {name: theirs(name) for name in DENSE}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_are_those_of_torch(layout: str, expected: dict[str, Found], tmp_path: Path) -> None:
    compare_steps(expected, *LAYOUTS[layout], tmp_path)


@pytest.mark.parametrize("name", DENSE)
def test_greedy_text_is_theirs(name: str, tmp_path: Path) -> None:
    compare_greedy_text(name, tmp_path)
