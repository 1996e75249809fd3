"""Adafactor (arXiv:1804.04235) of torch: factored second moments, relative step sizes.

The learning rate of step t is min(lr, 1/sqrt(t)) times the root mean square of the tensor, at least eps2 (section 8).
"""

from __future__ import annotations

from functools import partial

import torch

from megatron.optim.builder_args import Groups, OptimizerArgs
from megatron.optim.unsharded import unsharded


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds torch.optim.Adafactor."""
    make = partial(
        torch.optim.Adafactor,
        lr=args.lr,
        beta2_decay=args.number("beta2_decay", -0.8),
        eps=(None, args.number("eps", 1.0e-3)),
        d=args.number("d", 1.0),
    )
    return unsharded(groups, make, args.topology.model)
