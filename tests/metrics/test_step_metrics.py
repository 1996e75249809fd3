"""The metrics of a report, computed by hand."""

from __future__ import annotations

import pytest

from megatron.metrics.step_metrics import step_metrics

STEP = {
    "loss": 2.5,
    "learning_rate": 1e-3,
    "grad_norm": 0.5,
    "loss_scale": 1.0,
    "more": {"balance_loss": 1.25},
    "consumed_tokens": 4096,
    "seconds": 0.5,
    "tokens": 1024.0,
    "flops": 3.0e12,
    "peak_memory_bytes": 2.0**30,
}


def test_speeds_are_those_of_one_step() -> None:
    found = step_metrics(**STEP, peak_flops=1.0e13)
    assert found["runtime/tokens_per_sec"] == 2048.0
    assert found["runtime/flops_per_sec_per_gpu"] == 6.0e12
    assert found["runtime/model_flops_utilization"] == pytest.approx(0.6)
    assert found["train/balance_loss"] == 1.25 and found["train/lm_loss"] == 2.5


def test_an_unknown_peak_gives_no_utilization() -> None:
    assert "runtime/model_flops_utilization" not in step_metrics(**STEP, peak_flops=0.0)


def test_steps_without_a_label_report_no_loss() -> None:
    found, labelled = (step_metrics(**{**STEP, "loss": loss}, peak_flops=0.0) for loss in (None, 2.5))
    assert labelled.keys() - found.keys() == {"train/lm_loss"}
