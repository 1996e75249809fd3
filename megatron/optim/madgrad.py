"""MADGRAD (arXiv:2101.11075) with decoupled weight decay: dual averaging of gradients, with momentum.

The package's optimizer counts steps once for all parameters. ZeRO 3 steps one part of them after the other, so the
count is kept with each parameter here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_optimizer import MADGRAD

from megatron.optim.builder_args import STEP, Groups, Request, count_in_integers

SHARED_COUNT = "k"


class Madgrad(MADGRAD):  # type: ignore[misc]
    """MADGRAD that knows how often each parameter was updated."""

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


def build(groups: Groups, request: Request) -> torch.optim.Optimizer:
    """The MADGRAD of the package pytorch-optimizer."""
    optimizer = Madgrad(
        groups,
        lr=request.lr,
        momentum=request.number("momentum", 0.9),
        eps=request.number("eps", 1.0e-6),
        weight_decouple=True,
    )
    return count_in_integers(optimizer)
