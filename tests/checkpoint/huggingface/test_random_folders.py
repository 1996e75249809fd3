"""Folders of transformers drawn at random are read as transformers reads them, or refused; never otherwise."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron.errors import ConfigError, RunError
from tests.checkpoint.huggingface.random_models import DRAWN, ours, write

SOME, MANY = 16, 400
CLOSE = 1e-5  # of the largest logit, beside an absolute 1e-5


def differing(family: str, seeds: range, folder: Path) -> tuple[list[str], int]:
    """The configurations that are read otherwise, and how many were read."""
    errors, read = [], 0
    for seed in seeds:
        reported = DRAWN[family](random.Random(f"{family} {seed}")) | {"model_type": family}
        expected = write(folder / str(seed), reported)
        if expected is None:
            continue
        try:
            found = ours(folder / str(seed))
        except (ConfigError, RunError):
            continue
        read += 1
        apart = float((found - expected).abs().max())
        if not apart <= CLOSE * max(1.0, float(expected.abs().max())):
            errors.append(f"{apart:.3g} apart: {reported}")
    return errors, read


@pytest.mark.parametrize("family", DRAWN)
def test_some_are_read_alike_or_refused(family: str, tmp_path: Path) -> None:
    errors, read = differing(family, range(SOME), tmp_path)
    assert errors == []
    assert read >= SOME // 4, "most of them were refused, so little was compared"


@pytest.mark.long
@pytest.mark.parametrize("family", DRAWN)
def test_many_are_read_alike_or_refused(family: str, tmp_path: Path) -> None:
    errors, read = differing(family, range(MANY), tmp_path)
    assert errors == []
    assert read >= MANY // 4, "most of them were refused, so little was compared"
