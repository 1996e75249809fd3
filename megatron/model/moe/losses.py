"""Router losses: load balancing and z-loss, and how they enter the gradient.

Load balance (arXiv:2101.03961, equation 4): e sum_i f_i P_i, where f_i is the fraction of assignments to expert i and
P_i its mean probability; 1 if both are even. f is taken over the tokens of all data-parallel ranks in this micro batch,
so that the mean over ranks is the loss of all tokens. Router z (arXiv:2202.08906, equation 5): the mean of
logsumexp(logits)². Padding that the packing of documents added counts in neither, as in `transformers`.

An MoE layer may be on any pipeline stage, far from the language model's loss. So its losses are not communicated: the
backward pass through the block adds their gradient there, scaled like the language model's loss (as in Megatron-LM).

Shapes: n tokens, e experts, k experts of a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.mesh import Axis, Topology

NAMES = ("moe_load_balance_loss", "moe_z_loss", "moe_dropped")


def mean_weights(real: Tensor, axis: Axis) -> Tensor:
    """Returns the weight of each token [n]; the ranks' mean of weighted sums is the mean over real tokens of all ranks.

    real: False for padding, [n]; axis: ranks whose tokens form one batch.
    """
    weights = real.to(torch.float32)
    total = weights.sum()
    if axis.size > 1:
        dist.all_reduce(total, group=axis.group)
    return weights * (axis.size / total.clamp(min=1))


def load_balance(probabilities: Tensor, counts: Tensor, axis: Axis, weights: Tensor | None = None) -> Tensor:
    """Returns the loss of equation 4, scalar.

    Args:
        probabilities: [n, e].
        counts: Assignments of each expert, without those of padding, [e].
        axis: Ranks whose tokens form one batch.
        weights: Of each token in a mean (`mean_weights`), [n]; None where there is no padding.
    """
    counts = counts.to(probabilities.dtype)
    if axis.size > 1:
        dist.all_reduce(counts, group=axis.group)
    mean = probabilities.mean(dim=0) if weights is None else weights.to(probabilities.dtype) @ probabilities
    return len(counts) * (counts / counts.sum().clamp(min=1) * mean).sum()


def z_loss(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the mean of logsumexp(logits)², scalar. logits [n, e]; weights as for load_balance."""
    squares = logits.logsumexp(dim=-1).square()
    return squares.mean() if weights is None else (weights.to(squares.dtype) * squares).sum()


class RouterLossTracker:
    """Coefficients, scale and measurements of the losses of all MoE layers of a rank.

    scale: factor from the language model's loss to the start of its backward pass, which is the loss scale over the
    number of micro batches; set by the engine before a step.
    """

    def __init__(self, balance: float, z: float) -> None:
        self.balance, self.z = balance, z
        self.scale = 1.0
        self._sums: Tensor | None = None
        self._count = 0

    def attach(self, weights: Tensor, balance: Tensor, z: Tensor, dropped: Tensor) -> Tensor:
        """Returns the weights; their backward pass adds the gradients of the two losses and records their values.

        Args:
            weights: Weights of the chosen experts [n, k].
            balance: Load-balancing loss, scalar.
            z: Router z-loss, scalar.
            dropped: Fraction of dropped assignments, scalar.
        """
        attached: Tensor = _Attach.apply(weights, balance, z, dropped, self)
        return attached

    def note(self, values: Tensor) -> None:
        """Records one MoE layer and one micro batch. values: in the order of NAMES, [3]."""
        self._sums = values if self._sums is None else self._sums + values
        self._count += 1

    def take(self, topology: Topology, device: torch.device) -> dict[str, Tensor]:
        """Returns name -> mean over layers, micro batches and ranks since the last call; collective."""
        sums = torch.zeros(len(NAMES), device=device) if self._sums is None else self._sums
        totals = torch.cat((sums, torch.full((1,), float(self._count), device=device)))
        for axis in (topology.dp_cp, topology.pipe):
            if axis.size > 1:
                dist.all_reduce(totals, group=axis.group)
        self._sums, self._count = None, 0
        return dict(zip(NAMES, (totals[:-1] / totals[-1].clamp(min=1)).unbind(), strict=True))


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, balance: Tensor, z: Tensor, dropped: Tensor, losses: RouterLossTracker
    ) -> Tensor:
        ctx.losses = losses
        ctx.values = torch.stack((balance, z, dropped)).detach()
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        losses = ctx.losses
        losses.note(ctx.values)
        one = torch.full_like(ctx.values[0], losses.scale)
        return grads[0], losses.balance * one, losses.z * one, None, None
