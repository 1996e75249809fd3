"""Cross entropy of logits whose vocabulary is cut over tensor-parallel ranks, without gathering them.

Three numbers a token cross the ranks: the largest logit, the sum of exponentials and the target's logit
(Megatron-LM, arXiv:1909.08053, section 3). Shapes: v vocabulary, t tensor-parallel degree; leading dimensions are free.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.kernels.cross_entropy import cross_entropy, row_statistics, softmax_gradient
from megatron.parallel.collectives import all_reduce
from megatron.parallel.topology import Axis


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, axis: Axis) -> Tensor:
        rows, ids = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
        largest, total = row_statistics(rows)
        shared = all_reduce(largest.clone(), axis, dist.ReduceOp.MAX)
        total = all_reduce(total * torch.exp(largest - shared), axis)
        log_sum = shared + torch.log(total)
        local = ids - axis.rank * rows.shape[1]
        elsewhere = (local < 0) | (local >= rows.shape[1])
        local = local.masked_fill(elsewhere, 0)
        target = rows.gather(1, local.unsqueeze(1)).squeeze(1).float().masked_fill(elsewhere, 0)
        ctx.save_for_backward(rows, log_sum, local, elsewhere)
        ctx.shape = logits.shape
        return (log_sum - all_reduce(target, axis)).view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows, log_sum, local, elsewhere = ctx.saved_tensors
        scale = grads[0].reshape(-1).float()
        gradient = softmax_gradient(rows, log_sum, local, scale, hit=scale.masked_fill(elsewhere, 0))
        return gradient.view(ctx.shape), None, None


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, axis: Axis) -> Tensor:
    """-log p(target): logits [..., v/t] of any float type and global token ids [...] -> fp32 losses [...].

    Every rank of the axis receives the same losses; the gradient on each rank is that of its own logits.
    """
    if axis.size == 1:
        return cross_entropy(logits, targets)
    losses: Tensor = _VocabParallelCrossEntropy.apply(logits, targets, axis)
    return losses
