"""Lion (arXiv:2302.06675, algorithm 2): sign of an interpolated momentum, decoupled weight decay."""

from __future__ import annotations

import torch
from pytorch_optimizer import Lion

from megatron.optim.builder_args import Groups, OptimizerArgs


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds the Lion of the package pytorch-optimizer. Its learning rate is usually a third to a tenth of Adam's."""
    optimizer: torch.optim.Optimizer = Lion(groups, lr=args.lr, betas=args.betas((0.9, 0.99)))
    return optimizer
