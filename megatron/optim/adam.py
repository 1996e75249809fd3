"""Adam (arXiv:1412.6980), with decoupled weight decay (arXiv:1711.05101) unless adam_w_mode is false.

torch has it fused, one kernel for all parameters on CPU and GPU, so DeepSpeed's kernel is not needed, and Apex's runs
only where it is asked for: the arithmetic is the same. Without bias correction the update is lr m / (sqrt(v) + eps);
torch computes lr / c1 m / (sqrt(v) / c2 + eps) with c1 = 1 - beta1^t and c2 = sqrt(1 - beta2^t), which is that update
for the learning rate lr c1 / c2 and the epsilon eps / c2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron.optim.builder_args import STEP, Groups, OptimizerArgs

BETAS = (0.9, 0.999)
EPS = 1.0e-8


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds Adam with the kernel of the table, torch's unless another one is asked for."""
    return (args.kernel or build_fused)(groups, args)


def build_fused(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds Adam with torch's fused kernel."""
    return _build(groups, args, fused=True)


def build_on_cpu(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds Adam from plain torch operations, for parameters or offloaded copies in host memory."""
    return _build(groups, args, fused=False)


def _build(groups: Groups, args: OptimizerArgs, *, fused: bool) -> torch.optim.Optimizer:
    decoupled = args.flag("adam_w_mode", True)
    kind: type[torch.optim.Adam]
    if args.flag("bias_correction", True):
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    else:
        kind = UncorrectedAdamW if decoupled else UncorrectedAdam
    return kind(
        groups,
        lr=args.lr,
        betas=args.betas(BETAS),
        eps=args.number("eps", EPS),
        amsgrad=args.flag("amsgrad", False),
        fused=fused or None,
        foreach=None if fused else False,
    )


class UncorrectedAdam(torch.optim.Adam):
    """Adam without bias correction; weight decay is part of the gradient."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        with _uncorrected(self, decoupled=False):
            return super().step(closure)


class UncorrectedAdamW(torch.optim.AdamW):
    """Adam without bias correction, with decoupled weight decay."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        with _uncorrected(self, decoupled=True):
            return super().step(closure)


@contextmanager
def _uncorrected(optimizer: torch.optim.Optimizer, *, decoupled: bool) -> Iterator[None]:
    """Sets the learning rate and epsilon that cancel the bias correction of one step, and restores them afterwards."""
    names = ("lr", "eps", "weight_decay")
    own = [{name: group[name] for name in names} for group in optimizer.param_groups]
    try:
        for group in optimizer.param_groups:
            first, second = _corrections(optimizer, group)
            group["lr"] *= first / second
            group["eps"] /= second
            if decoupled:  # torch multiplies the decay by the learning rate
                group["weight_decay"] *= second / first
        yield
    finally:
        for group, values in zip(optimizer.param_groups, own, strict=True):
            group.update(values)


def _corrections(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[float, float]:
    """Returns 1 - beta1^t and sqrt(1 - beta2^t) of the coming step t, which all parameters of a group share."""
    counts = (optimizer.state[parameter].get(STEP, 0) for parameter in group["params"] if parameter in optimizer.state)
    coming = int(next(counts, 0)) + 1
    beta1, beta2 = group["betas"]
    return 1 - beta1**coming, math.sqrt(1 - beta2**coming)
