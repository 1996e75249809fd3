"""Every pipeline schedule trains like one process in every layout: some by default, all of them with `long`."""

from __future__ import annotations

from dataclasses import fields

import pytest

from tests.parity.matrix import Comparison
from tests.parity.scheduled import SIZES, ScheduledRow, covering, rows


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return Comparison(tmp_path_factory.mktemp("scheduled"))


@pytest.fixture(scope="module")
def covered(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    found = Comparison(tmp_path_factory.mktemp("covered"), steps=3, evaluations=1)
    found.train_together(covering())
    return found


def test_the_rows_hold_every_schedule_with_every_setting() -> None:
    assert list(SIZES) == [field.name for field in fields(ScheduledRow)]
    assert {(row.schedule, row.pp, row.zero) for row, _ in rows()} >= {
        (schedule, pp, zero) for schedule in SIZES["schedule"] for pp in (2, 4) for zero in (0, 1)
    }
    assert {(row.schedule, row.pp) for row, _ in covering()} == {
        (schedule, pp) for schedule in SIZES["schedule"] for pp in (2, 4)
    }


@pytest.mark.parametrize(("row", "model"), covering(), ids=str)
def test_covering_layouts(row: ScheduledRow, model: str, covered: Comparison) -> None:
    difference = covered.of(row, model)
    assert difference.good, str(difference)


@pytest.mark.long
@pytest.mark.parametrize(("row", "model"), rows(), ids=str)
def test_all_layouts(row: ScheduledRow, model: str, comparison: Comparison) -> None:
    difference = comparison.of(row, model)
    assert difference.good, str(difference)
