"""Adafactor (arXiv:1804.04235) as torch ships it: second moments from the means of rows and columns, relative steps.

The rate of step t is min(lr, 1/sqrt(t)) times the root mean square of the tensor, at least eps2 (section 8).
"""

from __future__ import annotations

from functools import partial

import torch

from megatron.optim.builder_args import Groups, Request
from megatron.optim.unsharded import unsharded


def build(groups: Groups, request: Request) -> torch.optim.Optimizer:
    """torch.optim.Adafactor."""
    make = partial(
        torch.optim.Adafactor,
        lr=request.lr,
        beta2_decay=request.number("beta2_decay", -0.8),
        eps=(None, request.number("eps", 1.0e-3)),
        d=request.number("d", 1.0),
    )
    return unsharded(groups, make, request.topology.model)
