"""Folders of transformers drawn at random are read as transformers reads them, or refused; never otherwise."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.errors import ConfigError, RunError
from tests.checkpoint.huggingface.random_models import DRAWN, attention_of, ours, tokens, write

SOME, MANY = 16, 400
CLOSE = 1e-5  # of the largest logit, beside an absolute 1e-5
STRICT, MOST = 30, 10  # later ones than the first may be MOST times as far, where transformers is as far from itself


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
        limit = CLOSE * max(1.0, float(expected.abs().max()))
        if not apart <= limit and seed >= STRICT:
            limit = min(MOST * limit, moved_by_rounding(folder / str(seed), expected))
        if not apart <= limit:
            errors.append(f"{apart:.3g} apart: {reported}")
    return errors, read


def moved_by_rounding(folder: Path, expected: torch.Tensor) -> float:
    """How far the logits of transformers move with weights that are half a unit in the last place away, drawn 4 times.

    Scores that are multiplied by 12, three blocks of which feed each other, make 1e-4 of a difference of 6e-8.
    """
    half = torch.finfo(torch.float32).eps / 2
    generator = torch.Generator().manual_seed(1)
    moved = []
    for _ in range(4):
        model = AutoModelForCausalLM.from_pretrained(folder, **attention_of(folder)).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + half * torch.randint(-1, 2, weight.shape, generator=generator))
            moved.append(float((model(tokens()).logits - expected).abs().max()))
    return max(moved)


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
