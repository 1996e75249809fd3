"""Router losses: load balancing and z-loss, and how they enter the gradient.

Load balance (arXiv:2101.03961, equation 4): e sum_i f_i P_i, where f_i is the fraction of assignments to expert i and
P_i its mean probability; 1 if both are even. f is taken over the tokens of all data-parallel ranks in this micro batch,
so that the mean over ranks is the loss of all tokens. Router z (arXiv:2202.08906, equation 5): the mean of
logsumexp(logits)². Padding that the packing of documents added counts in none, as in `transformers`.

Two more balance losses have the same form. That of sequences (arXiv:2412.19437, equations 17 to 20) is the mean over
sequences, each with its own f and P; f counts the experts of the highest scores, without the correction bias and
groups. That of the global batch (arXiv:2501.11873) takes f over the micro batches of the step whose backward pass has
come so far, in their order, which is the same in every layout. With sigmoid scores P are scores that are divided by
their sum.

An MoE layer may be on any pipeline stage, far from the language model's loss. So its losses are not communicated: the
backward pass through the block adds their gradient there, scaled like the language model's loss (as in Megatron-LM).

Shapes: n tokens, e experts, k experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.schema.moe import MoeSection
from megatron.distributed.mesh import Axis, Topology

NAMES = ("moe_load_balance_loss", "moe_z_loss", "moe_dropped")
SEQUENCE, GLOBAL = "moe_seq_balance_loss", "moe_global_balance_loss"


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
    return len(counts) * (counts / counts.sum().clamp(min=1) * mean_probabilities(probabilities, weights)).sum()


def mean_probabilities(probabilities: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the mean of [n, e] over tokens, [e]. weights: as for load_balance."""
    return probabilities.mean(dim=0) if weights is None else weights.to(probabilities.dtype) @ probabilities


def sequence_balance(probabilities: Tensor, k: int, batch: int, axis: Axis, real: Tensor | None = None) -> Tensor:
    """Returns the mean balance loss of the sequences, scalar.

    Args:
        probabilities: [n, e], the tokens of a position together.
        k: Experts of a token.
        batch: Sequences.
        axis: Ranks that share the sequences.
        real: False for padding, [n]; None where there is none.
    """
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.detach().topk(k, dim=-1).indices, 1.0)
    if real is not None:
        probabilities, chosen = probabilities * real[:, None], chosen * real[:, None]
    by_sequence = (-1, batch, probabilities.shape[1])
    counts = chosen.view(by_sequence).sum(0)  # [b, e]
    if axis.size > 1:
        dist.all_reduce(counts, group=axis.group)
    assigned = counts.sum(dim=1, keepdim=True).clamp(min=1)  # k times the tokens
    mean = probabilities.view(by_sequence).sum(0) * (k * axis.size) / assigned
    return counts.shape[1] * (counts / assigned * mean).sum(dim=1).mean()


def z_loss(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the mean of logsumexp(logits)², scalar. logits [n, e]; weights as for load_balance."""
    squares = logits.logsumexp(dim=-1).square()
    return squares.mean() if weights is None else (weights.to(squares.dtype) * squares).sum()


class ExpertCounts:
    """Assignments of each expert in the current step, over the micro batches whose backward pass has come."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, counts: Tensor) -> Tensor:
        """Adds the assignments of a micro batch [e]; returns the total."""
        self.total = counts if self.total is None else self.total + counts
        return self.total

    def take(self) -> Tensor | None:
        """Returns the total of the step, and begins the next one; None if there was no backward pass."""
        total, self.total = self.total, None
        return total


@dataclass(frozen=True)
class RouterTerms:
    """The losses of one MoE layer in one micro batch."""

    balance: Tensor
    """Load-balancing loss, scalar."""
    z: Tensor
    """Router z-loss, scalar."""
    dropped: Tensor
    """Fraction of dropped assignments, scalar."""
    sequence: Tensor | None = None
    """Balance loss of sequences, scalar; None without one."""
    mean: Tensor | None = None
    """Mean probability of each expert [e], for the balance loss of the global batch; None without one."""


class RouterLossTracker:
    """Coefficients, scale and measurements of the losses of all MoE layers of a rank.

    scale: factor from the language model's loss to the start of its backward pass, which is the loss scale over the
    number of micro batches; set by the engine before a step.
    """

    def __init__(self, balance: float, z: float, sequence: float = 0.0, of_global_batch: float = 0.0) -> None:
        """Begins without measurements.

        Args:
            balance: Coefficient of the load balance loss.
            z: Coefficient of the router's z-loss.
            sequence: Coefficient of the balance loss of sequences.
            of_global_batch: Coefficient of the balance loss of the global batch.
        """
        self.balance, self.z, self.sequence, self.of_global_batch = balance, z, sequence, of_global_batch
        self.scale = 1.0
        self.names = NAMES + ((SEQUENCE,) if sequence else ()) + ((GLOBAL,) if of_global_batch else ())
        self._sums: Tensor | None = None
        self._count = 0

    @classmethod
    def of(cls, moe: MoeSection) -> RouterLossTracker:
        """Returns the tracker with the coefficients of a configuration."""
        return cls(
            moe.moe_aux_loss_coeff, moe.moe_z_loss_coeff, moe.moe_seq_aux_loss_coeff, moe.moe_global_aux_loss_coeff
        )

    def attach(
        self, weights: Tensor, terms: RouterTerms, counts: Tensor | None = None, step: ExpertCounts | None = None
    ) -> Tensor:
        """Returns the weights; their backward pass adds the gradients of the losses and records their values.

        Args:
            weights: Weights of the chosen experts [n, k].
            terms: The losses.
            counts: Assignments of each expert in this micro batch [e], where they are counted.
            step: Adds up the counts; the balance loss of the global batch reads the total.
        """
        attached: Tensor = _Attach.apply(
            weights, terms.balance, terms.z, terms.dropped, terms.sequence, terms.mean, self, counts, step
        )
        return attached

    def note(self, values: Tensor) -> None:
        """Records one MoE layer and one micro batch. values: in the order of `names`."""
        self._sums = values if self._sums is None else self._sums + values
        self._count += 1

    def take(self, topology: Topology, device: torch.device) -> dict[str, Tensor]:
        """Returns name -> mean over layers, micro batches and ranks since the last call; collective."""
        sums = torch.zeros(len(self.names), device=device) if self._sums is None else self._sums
        totals = torch.cat((sums, torch.full((1,), float(self._count), device=device)))
        for axis in (topology.dp_cp, topology.pipe):
            if axis.size > 1:
                dist.all_reduce(totals, group=axis.group)
        self._sums, self._count = None, 0
        return dict(zip(self.names, (totals[:-1] / totals[-1].clamp(min=1)).unbind(), strict=True))


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        balance: Tensor,
        z: Tensor,
        dropped: Tensor,
        sequence: Tensor | None,
        mean: Tensor | None,
        losses: RouterLossTracker,
        counts: Tensor | None,
        step: ExpertCounts | None,
    ) -> Tensor:
        ctx.losses, ctx.counts, ctx.step = losses, counts, step
        ctx.values = torch.stack([one for one in (balance, z, dropped, sequence) if one is not None]).detach()
        ctx.mean = None if mean is None else mean.detach()
        ctx.has_sequence = sequence is not None
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        losses, values, of_mean = ctx.losses, ctx.values, None
        one = torch.full_like(values[0], losses.scale)
        total = None if ctx.step is None else ctx.step.add(ctx.counts)
        if ctx.mean is not None and total is not None:
            fractions = total.to(ctx.mean.dtype) / total.sum().clamp(min=1)
            values = torch.cat((values, (len(total) * (fractions * ctx.mean).sum()).reshape(1)))
            of_mean = losses.of_global_batch * losses.scale * len(total) * fractions
        losses.note(values)
        of_sequence = losses.sequence * one if ctx.has_sequence else None
        return grads[0], losses.balance * one, losses.z * one, None, of_sequence, of_mean, None, None, None
