"""MADGRAD (arXiv:2101.11075) with decoupled weight decay: dual averaging of gradients, with momentum.

The package's optimizer counts steps once for all parameters. ZeRO 3 steps one partition after the other, so the count
is stored with each parameter here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_optimizer import MADGRAD

from megatron.optim.builder_args import STEP, Groups, OptimizerArgs, mark_int_step

SHARED_COUNT = "k"


class Madgrad(MADGRAD):
    """MADGRAD with a step count for each parameter."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        stepped = [
            parameter
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter.numel()
        ]
        counts = {self.state[parameter].get(STEP, 0) for parameter in stepped}
        assert len(counts) <= 1, "parameters that are updated together have been updated equally often"
        count = counts.pop() if counts else 0
        self.state[SHARED_COUNT] = torch.tensor([count])
        loss = super().step(closure)
        del self.state[SHARED_COUNT]
        for parameter in stepped:
            self.state[parameter][STEP] = count + 1
        return loss


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds the MADGRAD of the package pytorch-optimizer."""
    optimizer = Madgrad(
        groups,
        lr=args.lr,
        momentum=args.number("momentum", 0.9),
        eps=args.number("eps", 1.0e-6),
        weight_decouple=True,
    )
    return mark_int_step(optimizer)
