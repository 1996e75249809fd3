"""Every layout computes the same training run as one process: a covering subset by default, all of them with `long`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import combinations

import pytest

from tests.end_to_end.runs import BASE, series
from tests.parity.matrix import MODELS, Comparison, Row, covering, model_of, rows


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comparison]:
    return Comparison(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def covered(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Three steps show what ten do: the second one already depends on the first one's update."""
    found = Comparison(tmp_path_factory.mktemp("covered"), steps=3, evaluations=1)
    found.train_together(covering())
    return found


def test_the_matrix_is_what_the_rules_allow() -> None:
    """400 layouts; each pair of settings that occurs in any of them occurs in the covering ones."""
    assert len(rows()) == 400

    def pairs(some: tuple[Row, ...]) -> set[object]:
        return {pair for row in some for pair in combinations(asdict(row).items(), 2)}

    assert pairs(tuple(row for row, _ in covering())) == pairs(rows())
    assert {model for _, model in covering()} == set(MODELS)


@pytest.mark.parametrize(("row", "model"), covering(), ids=str)
def test_covering_layouts(row: Row, model: str, covered: Comparison) -> None:
    difference = covered.of(row, model)
    assert difference.good, str(difference)


@pytest.mark.long
@pytest.mark.parametrize("row", rows(), ids=str)
def test_all_layouts(row: Row, comparison: Comparison) -> None:
    difference = comparison.of(row, model_of(row))
    assert difference.good, str(difference)


@pytest.mark.parametrize("layers", sorted({row.layers for row in rows()}))
@pytest.mark.parametrize("model", MODELS)
def test_clipping_is_active_and_the_model_learns(model: str, layers: int, covered: Comparison) -> None:
    """Else the comparisons above would prove less than they say."""
    records = covered.single(model, layers)
    assert min(series(records, "train/grad_norm")) > BASE["gradient_clipping"]
    losses = series(records, "train/lm_loss")
    assert losses[-1] < losses[0] - 0.05
