"""SM3 (arXiv:1901.11150, algorithm SM3-II): second moments as one number a row and one a column of each matrix.

The package's SM3 has no weight decay; it is decoupled here, as in the other optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pytorch_optimizer import SM3

from megatron.optim.builder_args import Groups, OptimizerArgs
from megatron.optim.unsharded import unsharded


class DecayedSM3(SM3):
    """SM3 after a decay of the weights by lr x weight_decay."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            decay = group["lr"] * group["weight_decay"]
            weights = [parameter for parameter in group["params"] if parameter.grad is not None]
            if decay and weights:
                torch._foreach_mul_(weights, 1 - decay)
        return super().step(closure)


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds the SM3 of the package pytorch-optimizer; momentum averages its updates, beta its squared gradients."""
    make = partial(
        DecayedSM3,
        lr=args.lr,
        momentum=args.number("momentum", 0.0),
        beta=args.number("beta", 0.0),
        eps=args.number("eps", 1.0e-30),
    )
    return unsharded(groups, make, args.topology.model)
