"""Schedule-free AdamW (arXiv:2405.15682): an average of the iterates in place of a decay of the learning rate.

Gradients are taken at y, between the iterate z and the average x: y = beta1 x + (1 - beta1) z. The weights of the
parameters are y; `average` computes x. Weights of the average are (learning rate)^`lr_power` x (step)^`r`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor

from megatron.optim.builder_args import Groups, OptimizerArgs, mark_int_step
from megatron.optim.counted_steps import CountedSteps
from megatron.optim.param_groups import LR_SCALE

WEIGHT_SUM, LARGEST_LR = "weight_sum", "lr_max"
"""Names of a group's counts in the package."""
NAMES = ("schedule_free_weight_sum", "schedule_free_largest_lr")
"""Names of the same in a checkpoint."""
COUNTS, EMPTY = "counts", (0.0, -1.0)
"""Name of both in the state of a parameter, and their values before the first update."""


class ScheduleFreeAdamW(CountedSteps, pytorch_optimizer.ScheduleFreeAdamW):
    """Schedule-free AdamW with the counts of its average for each parameter, since ZeRO 3 steps parts of groups."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Updates y and z, with the sum of weights that belongs to the parameters of this step."""
        stepped = [
            (group, [one for one in group["params"] if one.grad is not None and one.numel()])
            for group in self.param_groups
        ]
        for group, parameters in stepped:
            found = [self.state[one].pop(COUNTS, EMPTY) for one in parameters]
            group[WEIGHT_SUM], group[LARGEST_LR] = _scaled(found[0] if found else EMPTY, group)
        result = super().step(closure)
        for group, parameters in stepped:
            for one in parameters:
                self.state[one][COUNTS] = _unscaled(group)
        return result

    def average(self, parameter: Tensor) -> Tensor:
        """Returns x, of which the parameter is y; the parameter itself before the first update."""
        z = self.state[parameter].get("z") if parameter in self.state else None
        if z is None:
            return parameter.detach()
        return torch.lerp(parameter.detach(), z, 1.0 - 1.0 / self.defaults["betas"][0])

    def numbers(self) -> dict[str, float]:
        """Returns the sum of weights and the largest learning rate; of a group with the learning rate's scale 1."""
        counts = next((state[COUNTS] for state in self.state.values() if COUNTS in state), None)
        return {} if counts is None else dict(zip(NAMES, counts, strict=True))

    def load_numbers(self, stored: Mapping[str, float]) -> None:
        """Restores `numbers` in the state of every parameter; does nothing where a checkpoint has none."""
        if not set(NAMES) <= set(stored):
            return
        for state in self.state.values():
            state[COUNTS] = tuple(stored[name] for name in NAMES)


def _scaled(counts: tuple[float, float], group: dict[str, Any]) -> tuple[float, float]:
    """Returns the sum of weights and the largest learning rate of a group with its own scale of the rate."""
    (total, largest), scale = counts, group.get(LR_SCALE, 1.0)
    return total * scale ** group["weight_lr_power"], largest * scale if largest > 0 else largest


def _unscaled(group: dict[str, Any]) -> tuple[float, float]:
    scale = group.get(LR_SCALE, 1.0)
    return group[WEIGHT_SUM] / scale ** group["weight_lr_power"], group[LARGEST_LR] / scale


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds the schedule-free AdamW of the package pytorch-optimizer."""
    optimizer = ScheduleFreeAdamW(
        groups,
        lr=args.lr,
        betas=args.betas((0.9, 0.999)),
        eps=args.number("eps", 1.0e-8),
        r=args.number("r", 0.0),
        weight_lr_power=args.number("lr_power", 2.0),
        foreach=False,
    )
    return mark_int_step(optimizer)
