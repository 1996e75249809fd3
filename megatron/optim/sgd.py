"""Stochastic gradient descent with momentum, as torch ships it. Its weight decay is part of the gradient."""

from __future__ import annotations

import torch

from megatron.optim.builder_args import Groups, Request


def build(groups: Groups, request: Request) -> torch.optim.Optimizer:
    """torch.optim.SGD; plain descent unless a momentum is given."""
    return torch.optim.SGD(
        groups,
        lr=request.lr,
        momentum=request.number("momentum", 0.0),
        dampening=request.number("dampening", 0.0),
        nesterov=request.flag("nesterov", False),
    )
