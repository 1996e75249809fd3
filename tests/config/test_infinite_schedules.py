"""Which rates and parts of the horizon the infinite schedules take."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.errors import ConfigError
from tests.config.small import resolved

GOOD = {"lr_decay_style": "infinite_inv_sqrt", "infinite_constant_lr": 5e-4, "min_lr": 1e-5}


@pytest.mark.parametrize(
    ("keys", "reported"),
    [
        ({"infinite_constant_lr": None}, "infinite_constant_lr = None.*0 < min_lr"),
        ({"infinite_constant_lr": 0.1}, "infinite_constant_lr = 0.1"),
        ({"min_lr": 0.0}, "anneals from it to min_lr = 0.0"),
        ({"infinite_cooldown_fraction": 0.95}, "parts are 1.06 of the horizon"),
        ({"infinite_anneal_fraction": 1.5}, "between 0 and 1"),
    ],
)
def test_rates_and_parts_that_do_not_follow_each_other_are_reported(keys: dict[str, Any], reported: str) -> None:
    resolved(**GOOD)
    with pytest.raises(ConfigError, match=reported):
        resolved(**{**GOOD, **keys})
