"""AdEMAMix (arXiv:2409.03137): Adam with a second, slow momentum, decoupled weight decay."""

from __future__ import annotations

import torch
from pytorch_optimizer import AdEMAMix

from megatron.optim.builder_args import Groups, OptimizerArgs, mark_int_step
from megatron.optim.counted_steps import CountedSteps


class CountedAdEMAMix(CountedSteps, AdEMAMix):
    """AdEMAMix with a step count for each parameter."""


def build(groups: Groups, args: OptimizerArgs) -> torch.optim.Optimizer:
    """Builds the AdEMAMix of the package pytorch-optimizer.

    beta3 is the decay rate of the slow momentum, alpha its weight; both grow over the first `slow_warmup` updates.
    """
    warmup = args.settings.get("slow_warmup")
    optimizer = CountedAdEMAMix(
        groups,
        lr=args.lr,
        betas=(*args.betas((0.9, 0.999)), args.number("beta3", 0.9999)),
        alpha=args.number("alpha", 5.0),
        t_alpha_beta3=None if warmup is None else float(warmup),
        eps=args.number("eps", 1.0e-8),
        weight_decouple=True,
    )
    return mark_int_step(optimizer)
