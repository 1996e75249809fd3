"""The seeds under which lm-eval loads and runs tasks (0.4.13: lm_eval/evaluator.py, simple_evaluate)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy

FEWSHOT_SEED = 1234
_PYTHON_SEED, _NUMPY_SEED = 0, 1234


@contextmanager
def fixed_seeds() -> Iterator[None]:
    """Tasks that draw from the global generators always draw the same; what runs around them is not disturbed."""
    before = random.getstate(), numpy.random.get_state()
    random.seed(_PYTHON_SEED)
    numpy.random.seed(_NUMPY_SEED)
    try:
        yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
