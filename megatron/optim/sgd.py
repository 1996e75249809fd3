"""Stochastic gradient descent with momentum, of torch. Its weight decay is part of the gradient."""

from __future__ import annotations

import torch

from megatron.optim.builder_args import Groups, OptimizerArgs


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds torch.optim.SGD, without momentum unless set."""
    return torch.optim.SGD(
        groups,
        lr=args.lr,
        momentum=args.number("momentum", 0.0),
        dampening=args.number("dampening", 0.0),
        nesterov=args.flag("nesterov", False),
    )
