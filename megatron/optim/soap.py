"""SOAP (arXiv:2409.11321): Adam in the eigenbasis of Shampoo's preconditioner, decoupled weight decay.

A matrix has a covariance of its rows, one of its columns, and their eigenvectors; dimensions above `max_dim` have none.
The first update only measures. Full tensors are needed (`unsharded.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pytorch_optimizer import SOAP
from torch import Tensor

from megatron.optim.builder_args import Groups, OptimizerArgs, mark_int_step
from megatron.optim.counted_steps import CountedSteps
from megatron.optim.unsharded import unsharded

LISTS = ("GG", "Q")
"""Names of state that has a matrix for each dimension."""


class CountedSOAP(CountedSteps, SOAP):
    """SOAP with a step count for each parameter. A checkpoint has its matrices, no settings and no empty lists."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Completes state that came from a checkpoint, then updates."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if "exp_avg" in self.state[parameter]:
                    self._complete(parameter, group)
        return super().step(closure)

    def _complete(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, beta = self.state[parameter], group["shampoo_beta"]
        state["precondition_frequency"] = group["precondition_frequency"]
        state["shampoo_beta"] = group["betas"][1] if beta is None else beta
        for name in LISTS:
            found = state.get(name)
            if found is None or len(found) < parameter.dim():
                state[name] = [*(found or []), *([] for _ in range(parameter.dim() - len(found or [])))]


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds the SOAP of the package pytorch-optimizer."""
    make = partial(
        CountedSOAP,
        lr=args.lr,
        betas=args.betas((0.95, 0.95)),
        precondition_frequency=int(args.number("precondition_frequency", 10)),
        max_precondition_dim=int(args.number("max_dim", 10000)),
        eps=args.number("eps", 1.0e-8),
    )
    return mark_int_step(unsharded(groups, make, args.topology.model))
