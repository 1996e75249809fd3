"""A checkpoint's learning-rate schedule against the configuration's."""

from pathlib import Path

import pytest

from megatron.checkpoint.load.lr_schedule_check import schedule_to_use
from megatron.errors import ConfigError

STORED = {"lr": 1e-3, "lr_decay_style": "cosine", "lr_decay_iters": 100, "min_lr": 1e-4, "warmup": 0.1}


def test_equal_ones_pass() -> None:
    assert schedule_to_use(STORED, dict(STORED), take_stored=False, location=Path("c")) == STORED


def test_every_difference_is_named() -> None:
    own = {**STORED, "lr": 2e-3, "lr_decay_iters": 200}
    with pytest.raises(ConfigError) as caught:
        schedule_to_use(STORED, own, take_stored=False, location=Path("c"))
    assert [issue.key for issue in caught.value.issues] == ["lr", "lr_decay_iters"]
    assert "lr_decay_iters = 200: the checkpoint c was trained with 100; set override_lr_scheduler" in str(caught.value)


def test_the_stored_one_can_be_taken() -> None:
    own = {**STORED, "lr": 2e-3, "new": 1}
    assert schedule_to_use(STORED, own, take_stored=True, location=Path("c")) == {**STORED, "new": 1}
