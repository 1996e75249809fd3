"""Lion (arXiv:2302.06675, algorithm 2): the sign of an interpolated momentum, with decoupled weight decay."""

from __future__ import annotations

import torch
from pytorch_optimizer import Lion

from megatron.optim.builder_args import Groups, Request


def build(groups: Groups, request: Request) -> torch.optim.Optimizer:
    """The Lion of the package pytorch-optimizer. Its rate is usually a third to a tenth of Adam's."""
    optimizer: torch.optim.Optimizer = Lion(groups, lr=request.lr, betas=request.betas((0.9, 0.99)))
    return optimizer
