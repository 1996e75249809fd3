"""Cross entropy of logits whose vocabulary is sharded over tensor-parallel ranks, without gathering them.

Two numbers a token are communicated, in one exchange: the log of the sum of exponentials of a rank's columns, and the
target's logit where it is among them (Megatron-LM, arXiv:1909.08053, section 3).

Shapes: r rows (tokens), v vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.distributed.mesh import Axis
from megatron.distributed.tensor_parallel.sequence_parallel import all_gather_first
from megatron.kernels.cross_entropy import GradientSpec, SoftmaxPass, softmax_pass


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, axis: Axis, vocabulary: int | None = None) -> Tensor:
    """-log p(target): logits [..., v/t] of any float type and global token ids [...] -> fp32 losses [...].

    Every rank of the axis gets the same losses; the gradient on each rank is that of its own logits.

    Args:
        logits: this rank's columns.
        targets: global token ids.
        axis: tensor-parallel ranks.
        vocabulary: number of tokens; logits of padding rows get no probability. None if there is no padding.
    """
    losses: Tensor = _CrossEntropy.apply(logits, targets, axis, vocabulary)
    return losses


def weighted_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, axis: Axis, vocabulary: int | None = None
) -> Tensor:
    """sum(weights * -log p(target)): logits [..., v/t], global token ids and fp32 weights [...] -> fp32 scalar.

    If a gradient is needed, this overwrites the logits with it, which saves the memory and the time of a second tensor
    of their size: read them before. It can be differentiated once.

    Args:
        logits: this rank's columns; overwritten.
        targets: global token ids.
        weights: weight of each token.
        axis: tensor-parallel ranks.
        vocabulary: number of tokens; logits of padding rows get no probability. None if there is no padding.
    """
    if logits.requires_grad and torch.is_grad_enabled():
        total: Tensor = _WeightedCrossEntropy.apply(logits, targets, weights, axis, vocabulary)
        return total
    return (vocab_parallel_cross_entropy(logits, targets, axis, vocabulary) * weights).sum()


@dataclass(frozen=True)
class LossTerms:
    """What the loss of rows of logits needs besides them."""

    labels: Tensor
    """Global token ids [r]."""
    weights: Tensor
    """Weight of each row in the sum [r]."""
    axis: Axis
    """Tensor-parallel ranks."""
    vocabulary: int | None = None
    """Number of tokens; logits of padding rows get no probability. None if there is no padding."""
    z_loss: float = 0.0
    """Coefficient of the squared log-sum-exp."""


def loss_of_rows(logits: Tensor, terms: LossTerms, softmax: SoftmaxPass = softmax_pass, *, overwrite: bool) -> Tensor:
    """sum(weights * (-log p(label) + z_loss * log_sum_exp²)) of logits [r, v/t], without autograd.

    Args:
        logits: This rank's columns.
        terms: Labels and weights.
        softmax: Softmax over the vocabulary.
        overwrite: The logits are overwritten with the gradient of the sum.
    """
    axis, scale = terms.axis, terms.weights.to(torch.promote_types(logits.dtype, torch.float32))
    ids = _Targets(terms.labels, logits, axis)
    hit = scale.masked_fill(ids.elsewhere, 0)
    real = _existing(logits, axis, terms.vocabulary)
    if overwrite and axis.size == 1 and not terms.z_loss:
        target_logits = ids.logits(logits)
        log_sum = softmax(real, GradientSpec(ids.local, scale, hit, real), None)
    else:
        local = _local_log_sums(real, softmax)
        log_sum, target_logits = _over_ranks(local, ids.logits(logits), axis)
        if overwrite:
            share = torch.exp(local - log_sum) * (1 + 2 * terms.z_loss * log_sum)
            _write_gradient(real, GradientSpec(ids.local, scale * share, hit, real), softmax, local)
    if overwrite and real.shape[1] < logits.shape[1]:
        logits[:, real.shape[1] :].zero_()
    losses = log_sum - target_logits
    if terms.z_loss:
        losses = losses + terms.z_loss * log_sum.square()
    return (losses * scale).sum()


def _existing(rows: Tensor, axis: Axis, vocabulary: int | None) -> Tensor:
    """Returns the columns of this rank's logits that belong to tokens: [r, v/t] -> [r, n], a view; n may be 0."""
    if vocabulary is None:
        return rows
    return rows[:, : max(0, min(rows.shape[1], vocabulary - axis.rank * rows.shape[1]))]


def _local_log_sums(rows: Tensor, softmax: SoftmaxPass = softmax_pass) -> Tensor:
    """Returns the log-sum-exp of a rank's columns [r]; minus infinity if it has none."""
    if rows.shape[1] == 0:
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return torch.full(rows.shape[:1], float("-inf"), dtype=dtype, device=rows.device)
    return softmax(rows, None, None)


def _write_gradient(
    rows: Tensor, spec: GradientSpec, softmax: SoftmaxPass = softmax_pass, log_sums: Tensor | None = None
) -> None:
    """Writes the gradient of a rank's columns, of which there may be none."""
    if rows.shape[1]:
        softmax(rows, spec, log_sums)


class _Targets:
    """Global ids [...] as rows of this rank: ids inside its slice [r], and a mask of those on other ranks [r]."""

    def __init__(self, targets: Tensor, rows: Tensor, axis: Axis) -> None:
        local = targets.reshape(-1) - axis.rank * rows.shape[1]
        self.elsewhere = (local < 0) | (local >= rows.shape[1])
        self.local = local.masked_fill(self.elsewhere, 0)

    def logits(self, rows: Tensor) -> Tensor:
        """Returns the target's logit of each row [r], fp32; 0 where another rank has it."""
        found = rows.gather(1, self.local.unsqueeze(1)).squeeze(1)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        return found.masked_fill(self.elsewhere, 0)


def _over_ranks(log_sum: Tensor, target_logits: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Returns the log-sum-exp of the full vocabulary and the logits of all targets, from each rank's, all [r]."""
    if axis.size == 1:
        return log_sum, target_logits
    ranks = all_gather_first(torch.stack((log_sum, target_logits)), axis)  # [2 t, r]
    return ranks[0::2].logsumexp(0), ranks[1::2].sum(0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, axis: Axis, vocabulary: int | None) -> Tensor:
        rows = logits.reshape(-1, logits.shape[-1])
        ids = _Targets(targets, rows, axis)
        local = _local_log_sums(_existing(rows, axis, vocabulary))
        log_sum, target_logits = _over_ranks(local, ids.logits(rows), axis)
        ctx.save_for_backward(rows, ids.local, ids.elsewhere, torch.exp(local - log_sum))
        ctx.shape, ctx.axis, ctx.vocabulary = logits.shape, axis, vocabulary
        return (log_sum - target_logits).view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows, local, elsewhere, share = ctx.saved_tensors
        scale = grads[0].reshape(-1)
        gradient = torch.zeros_like(rows)
        rows, out = (_existing(x, ctx.axis, ctx.vocabulary) for x in (rows, gradient))
        _write_gradient(rows, GradientSpec(local, scale * share, scale.masked_fill(elsewhere, 0), out))
        return gradient.view(ctx.shape), None, None, None


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor, axis: Axis, vocabulary: int | None
    ) -> Tensor:
        # detach shares the version counter: another operation that saved the logits for its gradient will raise.
        rows = logits.detach().reshape(-1, logits.shape[-1])
        terms = LossTerms(targets.reshape(-1), weights.reshape(-1), axis, vocabulary)
        total = loss_of_rows(rows, terms, overwrite=True)
        ctx.gradient = rows.view(logits.shape)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        gradient: Tensor | None = ctx.gradient
        if gradient is None:
            raise RuntimeError("this loss can be differentiated once: its gradient has taken the logits' memory")
        ctx.gradient = None
        if gradient.device.type != "cpu" or grads[0].item() != 1.0:  # reading a scalar would stall an accelerator
            gradient.mul_(grads[0])
        return gradient, None, None, None, None
