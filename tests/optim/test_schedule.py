"""Learning rates against closed forms and torch's own cosine schedule."""

import itertools
import math

import pytest
import torch

from megatron.optim import schedule
from megatron.registry import SCHEDULES


def build(style: str, *, warmup: float = 0.1, horizon: int = 100, floor: float = 1e-5) -> schedule.Schedule:
    return schedule.build(SCHEDULES.load(style), peak=1e-3, floor=floor, warmup_fraction=warmup, horizon=horizon)


@pytest.mark.parametrize("style", SCHEDULES.names)
def test_warms_up_from_above_zero_and_never_rises_again(style: str) -> None:
    rates = [build(style).rate(step) for step in range(1, 301)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[9:]))
    assert len(set(rates[100:])) == 1


@pytest.mark.parametrize("warmup", [0.0, 0.001, 0.005, 1.0])
def test_no_warmup_fraction_overshoots(warmup: float) -> None:
    rates = [build("cosine", warmup=warmup).rate(step) for step in range(1, 120)]
    assert all(0 < rate <= 1e-3 for rate in rates)


def test_cosine_equals_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=1e-5)
    ours = build("cosine")
    for step in range(10, 100):
        assert ours.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


def test_exponential_halves_over_the_horizon() -> None:
    assert build("exponential", warmup=0.0, floor=0.0).rate(100) == pytest.approx(5e-4)
    assert build("exponential", warmup=0.0, floor=0.0).rate(50) == pytest.approx(1e-3 / math.sqrt(2))
