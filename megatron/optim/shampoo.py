"""Shampoo (arXiv:1802.09568) in blocks, with the step size of another optimizer (grafting, arXiv:2002.11803).

A matrix is cut into blocks of at most `block_size` rows and columns. Each block has a covariance of its rows and one of
its columns, and their inverse roots. A tensor with a dimension above `max_dim` has none: it takes the grafted step.
Full tensors are needed (`unsharded.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pytorch_optimizer import ScalableShampoo
from pytorch_optimizer.optimizer.shampoo import LayerWiseGrafting, PreConditioner, build_graft
from torch import Tensor

from megatron.optim.builder_args import Groups, OptimizerArgs, mark_int_step
from megatron.optim.counted_steps import CountedSteps
from megatron.optim.unsharded import unsharded

GRAFTS = {"sgd": LayerWiseGrafting.SGD, "adagrad": LayerWiseGrafting.ADAGRAD, "rmsprop": LayerWiseGrafting.RMSPROP}
MATRICES = ("statistics", "pre_conditioners")
"""Names of state that has a matrix for each dimension of each block."""
GRAFT_TENSORS = ("momentum", "statistics")
"""Tensors of the grafted optimizer, in state under `graft_` and their name."""


class CountedShampoo(CountedSteps, ScalableShampoo):
    """Shampoo with a step count for each parameter, and with its matrices as tensors of the state."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Completes state that came from a checkpoint, then updates and lists the matrices in the state."""
        for parameter, group in self._parameters():
            state = self.state[parameter]
            if "momentum" in state and "graft" not in state:
                self._restore(parameter, state, group)
        result = super().step(closure)
        for parameter, _ in self._parameters():
            self._list_tensors(self.state[parameter])
        return result

    def _parameters(self) -> list[tuple[Tensor, dict[str, Any]]]:
        found = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        return [(parameter, group) for parameter, group in found if parameter.grad is not None]

    def _restore(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Builds the package's objects around the tensors of the state."""
        matrices = PreConditioner(
            parameter,
            group["betas"][1],
            self.inverse_exponent_override,
            self.block_size,
            self.skip_preconditioning_rank_lt,
            self.no_preconditioning_for_layers_with_dim_gt,
            self.shape_interpretation,
            self.pre_conditioner_type,
            self.matrix_eps,
            self.use_svd,
        )
        for name in MATRICES:
            for made, stored in zip(getattr(matrices, name), state.get(name, []), strict=True):
                made.copy_(stored)
        graft = build_graft(parameter, self.graft_type, self.diagonal_eps)
        for name in GRAFT_TENSORS:
            if hasattr(graft, name):
                getattr(graft, name).copy_(state[f"graft_{name}"])
        state.update(pre_conditioner=matrices, graft=graft)
        self._list_tensors(state)

    def _list_tensors(self, state: dict[str, Any]) -> None:
        for name in MATRICES:
            state[name] = list(getattr(state["pre_conditioner"], name))
        for name in GRAFT_TENSORS:
            if hasattr(state["graft"], name):
                state[f"graft_{name}"] = getattr(state["graft"], name)


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds the blocked Shampoo of the package pytorch-optimizer, with decoupled weight decay.

    The momentum is a mean, so that the learning rate is that of the grafted optimizer.
    """
    make = partial(
        CountedShampoo,
        lr=args.lr,
        betas=args.betas((0.9, 0.999)),
        moving_average_for_momentum=True,
        decoupled_weight_decay=True,
        start_preconditioning_step=int(args.number("start_step", 25)),
        preconditioning_compute_steps=int(args.number("precondition_frequency", 10)),
        block_size=int(args.number("block_size", 512)),
        no_preconditioning_for_layers_with_dim_gt=int(args.number("max_dim", 8192)),
        shape_interpretation=False,
        graft_type=GRAFTS[str(args.settings.get("graft", "rmsprop"))],
        matrix_eps=args.number("eps", 1.0e-6),
    )
    return mark_int_step(unsharded(groups, make, args.topology.model))
