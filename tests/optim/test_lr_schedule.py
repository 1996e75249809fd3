"""Learning rates against closed forms and torch's own cosine schedule."""

import itertools
import math

import pytest
import torch

from megatron.optim import lr_schedule
from megatron.registry import SCHEDULES

KEYS = {
    "infinite_constant_lr": 4e-4,
    "infinite_cooldown_fraction": 0.3,
    "infinite_anneal_fraction": 0.2,
    "power_amplitude": 0.05,
    "power_exponent": -0.51,
}


def build(style: str, *, warmup: float = 0.1, horizon: int = 100, min_lr: float = 1e-5) -> lr_schedule.LRSchedule:
    return lr_schedule.build(
        SCHEDULES.load(style),
        max_lr=1e-3,
        min_lr=min_lr,
        warmup_fraction=warmup,
        horizon=horizon,
        batch=8,
        tokens_per_step=8 * 1000,
        keys=KEYS,
    )


@pytest.mark.parametrize("style", SCHEDULES.names)
def test_warms_up_from_above_zero_and_never_rises_again(style: str) -> None:
    rates = [build(style).lr(step) for step in range(1, 301)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[9:]))
    assert len(set(rates[100:])) == 1


@pytest.mark.parametrize("warmup", [0.0, 0.001, 0.005, 1.0])
def test_no_warmup_fraction_overshoots(warmup: float) -> None:
    rates = [build("cosine", warmup=warmup).lr(step) for step in range(1, 120)]
    assert all(0 < lr <= 1e-3 for lr in rates)


@pytest.mark.parametrize("style", SCHEDULES.names)
def test_every_rate_is_the_closed_form(style: str) -> None:
    """Every rate of 120 steps: a run that is resumed after an update keeps its curve."""
    rates = [build(style).lr(step) for step in range(1, 121)]
    assert rates == pytest.approx([closed_form(style, step) for step in range(1, 121)], rel=1e-12)


def closed_form(style: str, step: int) -> float:
    """Peak 1e-3, floor 1e-5, warm-up to step 10, horizon 100; WSD falls over the last tenth."""
    peak, floor = 1e-3, 1e-5
    if step <= 10:
        return peak * step / 10
    step = min(step, 100)
    x = (step - 10) / 90
    return {
        "constant": peak,
        "linear": peak - (peak - floor) * x,
        "cosine": floor + (peak - floor) * (1 + math.cos(math.pi * x)) / 2,
        "exponential": max(floor, peak * 2**-x),
        "inverse_sqrt": max(floor, peak * math.sqrt(10 / step)),
        "wsd": peak - (peak - floor) * max(0.0, (step - 90) / 10),
        "infinite_cosine": infinite(step, (1 + math.cos(math.pi * (step - 10) / 30)) / 2),
        "infinite_inv_sqrt": infinite(step, 1 - (1 / math.sqrt(1 + (step - 10) / 3) - 1) / (1 / math.sqrt(11) - 1)),
        "power": floor + (power(min(step, 90)) - floor) * (1 - max(0.0, (step - 90) / 10)),
    }[style]


def infinite(step: int, cooldown: float) -> float:
    """From 1e-3 to 4e-4 until step 40, constant until 80, then by the same factor each step to 1e-5."""
    if step <= 40:
        return 4e-4 + 6e-4 * cooldown
    return 4e-4 if step <= 80 else 4e-4 * (1e-5 / 4e-4) ** ((step - 80) / 20)


def power(step: int) -> float:
    """Amplitude 0.05, 8 samples of 1,000 tokens, exponent -0.51, at most 1e-3."""
    return min(1e-3, 0.05 * 8 * (8000 * step) ** -0.51)


def test_power_rises_to_its_own_rate_where_that_is_below_the_maximum() -> None:
    schedule = lr_schedule.build(
        SCHEDULES.load("power"),
        max_lr=1.0,
        min_lr=0.0,
        warmup_fraction=0.1,
        horizon=100,
        batch=8,
        tokens_per_step=8000,
        keys=KEYS,
    )
    top = 0.05 * 8 * 80000**-0.51
    assert [schedule.lr(step) for step in (1, 5, 10)] == pytest.approx([top / 10, top / 2, top])


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_wsd_falls_in_the_shape_that_was_asked_for(shape: str, middle: float) -> None:
    wsd = lr_schedule.build(
        lr_schedule.wsd,
        max_lr=1.0,
        min_lr=0.0,
        warmup_fraction=0.0,
        horizon=200,
        warmup=20,
        decay_fraction=0.25,
        decay_shape=shape,
    )
    assert [wsd.lr(step) for step in (10, 20, 150, 175, 200, 250)] == pytest.approx([0.5, 1.0, 1.0, middle, 0.0, 0.0])


def test_a_warmup_in_steps_wins_over_the_fraction() -> None:
    linear = lr_schedule.build(lr_schedule.linear, max_lr=1.0, min_lr=0.0, warmup_fraction=0.5, horizon=100, warmup=4)
    assert [linear.lr(step) for step in (1, 4, 52, 100)] == pytest.approx([0.25, 1.0, 0.5, 0.0])


def test_a_floor_as_high_as_the_peak_is_flat() -> None:
    assert {build(style, min_lr=1e-3, warmup=0.0).lr(step) for style in SCHEDULES.names for step in (1, 50, 200)} == {
        1e-3
    }


def test_cosine_equals_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=1e-5)
    ours = build("cosine")
    for step in range(10, 100):
        assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


def test_exponential_halves_over_the_horizon() -> None:
    assert build("exponential", warmup=0.0, min_lr=0.0).lr(100) == pytest.approx(5e-4)
    assert build("exponential", warmup=0.0, min_lr=0.0).lr(50) == pytest.approx(1e-3 / math.sqrt(2))


@pytest.mark.parametrize(
    ("min_lr", "steps"), [(2e-4, {50: 1e-3 / math.sqrt(2), 100: 5e-4, 200: 5e-4}), (8e-4, {100: 8e-4})]
)
def test_the_minimum_bounds_exponential_and_does_not_lift_it(min_lr: float, steps: dict[int, float]) -> None:
    schedule = build("exponential", warmup=0.0, min_lr=min_lr)
    assert {step: schedule.lr(step) for step in steps} == pytest.approx(steps)
