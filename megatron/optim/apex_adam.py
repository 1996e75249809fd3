"""Adam of NVIDIA Apex: one launch for all parameters of a type, where `use_apex_adam` asks for it.

Apex counts updates in the parameter group. Here the count is in the state of each parameter, as with every Adam, so
that checkpoints load in both directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron.optim.adam import BETAS, EPS
from megatron.optim.builder_args import STEP, Groups, OptimizerArgs, mark_int_step


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds Apex's FusedAdam, which has no amsgrad."""
    from apex.optimizers import FusedAdam

    class CountingAdam(FusedAdam):
        """Apex's Adam with the count of updates in the state of each parameter."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            """Updates the parameters that have gradients."""
            assert closure is None, "closures are not supported"
            for group in self.param_groups:
                _set_group_count(self, group)
            super().step()
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.state[parameter][STEP] = int(group[STEP])

        def zero_grad(self, set_to_none: bool = True) -> None:
            """Drops the gradients; Apex's own takes no argument."""
            torch.optim.Optimizer.zero_grad(self, set_to_none)

    optimizer = CountingAdam(
        groups,
        lr=args.lr,
        bias_correction=args.flag("bias_correction", True),
        betas=args.betas(BETAS),
        eps=args.number("eps", EPS),
        adam_w_mode=args.flag("adam_w_mode", True),
    )
    optimizer._step_supports_amp_scaling = False  # whatever Apex says: it reads no flag of skipped updates
    return mark_int_step(optimizer)


def _set_group_count(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Sets the count that Apex reads to that of the parameters; without one they have made no update."""
    counts = [int(optimizer.state.get(parameter, {}).get(STEP, 0)) for parameter in group["params"]]
    group[STEP] = max(counts, default=0)
