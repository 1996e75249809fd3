"""The loss of a report: the mean over the steps that had a token to learn."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.engine.engine import StepResult
from megatron.training.loop import _reported, _Window
from megatron.training.step_schedule import StepSize

NAN = math.nan


@pytest.mark.parametrize(
    ("losses", "learns", "expected"),
    [
        ([6.0, 0.0, 4.0, 0.0], [True, False, True, False], 5.0),
        ([6.0, 0.0], [True, True], 3.0),
        ([6.0, 4.0], [None, None], 5.0),
        ([0.0, 0.0], [False, False], None),
        ([0.0, NAN, 3.0], [False, True, True], 3.0),
    ],
)
def test_a_step_without_a_token_to_learn_counts_in_no_mean(
    losses: list[float], learns: list[bool | None], expected: float | None
) -> None:
    window = _Window(clock=_Clock())  # type: ignore[arg-type]
    for loss, learnt in zip(losses, learns, strict=True):
        flag = None if learnt is None else torch.tensor(learnt)
        result = StepResult(torch.tensor(loss), torch.ones(()), 1e-3, 1.0, torch.tensor(False), learns=flag)
        window.add(result, StepSize(4, 2, 8, 8))
    assert window.take()[0] == expected
    assert window.losses == window.learns == []


@pytest.mark.parametrize("learns", [True, False])
def test_losses_of_further_tokens_need_a_label_too(learns: bool) -> None:
    more = {"mtp_1_loss": torch.tensor(2.0), "sop_loss": torch.tensor(1.0)}
    flag = torch.tensor(learns)
    result = StepResult(torch.zeros(()), torch.ones(()), 1e-3, 1.0, torch.tensor(False), more, learns=flag)
    assert _reported(result) == ({"mtp_1_loss": 2.0, "sop_loss": 1.0} if learns else {"sop_loss": 1.0})


class _Clock:
    def count(self) -> None:
        """Counts a step."""
