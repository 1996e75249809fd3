"""Rules of steps whose update is skipped: outliers and values that are not finite."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.small import errors


@pytest.mark.parametrize(
    ("keys", "reported"),
    [
        ({"skip_outlier_steps": 0.0}, "it is a number of standard deviations above the mean"),
        ({"skip_outlier_steps": 6.0, "outlier_window": 2}, "a mean and a deviation need losses"),
        ({"skip_outlier_steps": 6.0, "precision": "fp16"}, "lowers the loss scale of fp16"),
    ],
)
def test_outliers_are_found_by_a_limit_over_several_losses(keys: dict[str, Any], reported: str) -> None:
    assert any(reported in line for line in errors(**keys))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("key", "value"), [("on_nan", "skip"), ("skip_outlier_steps", 6.0)])
def test_gradients_on_the_host_allow_no_step_to_be_left_out(key: str, value: object, stage: int) -> None:
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    keys: dict[str, Any] = {key: value, "precision": "bfloat16", "zero_optimization": zero}
    found = errors(**keys)
    assert any(key in line and "apply no step after one that is left out" in line for line in found)
    for other in (
        {"precision": "fp32"},
        {"zero_optimization": {**zero, "stage": 3}},
        {key: None} if value == 6.0 else {},
    ):
        if other:
            assert not any("is left out" in line for line in errors(**{**keys, **other}))
