"""Retrieval objective: cross entropy of the right passage of a query, among the passages of the batch.

The passages of all data-parallel ranks' micro batches are candidates of every query, those that are there as negatives
of another query included. Micro batches of one step do not see each other's passages, as in Megatron-LM.

Each rank has the loss of its own queries. The gradient of a gathered passage is the sum of the gradients that it has in
the losses of all ranks, so the mean over ranks of the gradients is that of one process with all micro batches.

Sources: arXiv:1906.00300, section 4.1; arXiv:2004.04906, section 3.2.

Shapes: q queries and p passages of a rank, D data-parallel ranks, d width of an embedding, s sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron.distributed.collectives import all_reduce, with_grad
from megatron.distributed.mesh import Axis
from megatron.model.loss_parts import LossParts
from megatron.objectives.classification import ClassScores

RANK = "average_rank"


def top_name(count: int) -> str:
    """Returns the name of the share of queries whose passage is among the first ones. count: how many."""
    return f"top{count}_accuracy"


def retrieval_parts(tops: Sequence[int]) -> LossParts:
    """Returns what collects the measurements of batches; they are no part of the loss. tops: see `Retrieval`."""
    return LossParts((*map(top_name, tops), RANK), factor=0.0)


class Retrieval:
    """Cross entropy of the passage that belongs to a query [nats per query]."""

    def __init__(
        self,
        queries: int,
        data: Axis,
        *,
        scale: float = 1.0,
        tops: Sequence[int] = (1,),
        parts: LossParts | None = None,
        scores: ClassScores | None = None,
    ) -> None:
        """Takes the settings.

        Args:
            queries: first rows of a micro batch; the others are passages.
            data: data-parallel ranks, whose passages are candidates together.
            scale: factor of the products of embeddings.
            tops: numbers of first passages among which the right one is counted.
            parts: receives the measurements; None for none.
            scores: receives the embeddings of evaluations.
        """
        self._queries, self._data, self._scale = queries, data, scale
        self._tops, self._parts, self._scores = tuple(tops), parts, scores

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        axis: Axis,
        *,
        tokens: Tensor,
        vocabulary: int | None = None,
    ) -> Tensor:
        """Returns the sum over the micro batch's queries, divided by `tokens`: a scalar of at least fp32.

        Args:
            logits: embeddings, those of queries first [q + p, d].
            labels: in the first position of a query the number of its passage among this rank's, of a passage 1 if it
                is one and 0 if it is padding [q + p, s].
            loss_mask: 1 in the first position of a query that counts [q + p, s].
            axis: tensor-parallel ranks, which all have the same embeddings.
            tokens: the engine's divisor, which counts queries here.
            vocabulary: not used; objectives have one signature.
        """
        if self._scores is not None and not torch.is_grad_enabled():
            self._scores.add(logits)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        queries, passages = wide[: self._queries], wide[self._queries :]
        real = gathered_rows(labels[self._queries :, 0], self._data) > 0  # [D p]
        scores = queries @ with_grad(passages, self._data, gathered_rows, _own_rows_summed).t()  # [q, D p]
        scores = (scores * self._scale).masked_fill(~real, float("-inf"))
        right = labels[: self._queries, 0] + self._data.rank * len(passages)
        counted = loss_mask[: self._queries, 0] > 0
        self._measure(scores.detach(), right, counted)
        losses = F.cross_entropy(scores, right, reduction="none").masked_fill(~counted, 0.0)  # [q]
        return (losses / tokens).sum()

    def _measure(self, scores: Tensor, right: Tensor, counted: Tensor) -> None:
        """Records the measurements of a micro batch.

        Args:
            scores: [q, D p].
            right: number of each query's passage [q].
            counted: whether a query counts [q].
        """
        if self._parts is None:
            return
        ranks = ranks_of(scores, right)[counted]
        count = counted.sum()
        for top in self._tops:
            self._parts.note(top_name(top), (ranks < top).sum(), count)
        self._parts.note(RANK, ranks.sum(), count)


def ranks_of(scores: Tensor, right: Tensor) -> Tensor:
    """Returns how many other passages are before the right one, or equal to it: 0 is the best rank [q].

    Args:
        scores: [q, p].
        right: number of each query's passage [q].
    """
    own = scores.gather(1, right[:, None])
    return (scores >= own).sum(1) - 1


def gathered_rows(x: Tensor, axis: Axis) -> Tensor:
    """Returns the rows of all ranks in rank order, without a gradient: [p, ...] -> [D p, ...]."""
    if axis.size == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.contiguous(), group=axis.group)
    return torch.cat(parts)


def _own_rows_summed(grad: Tensor, axis: Axis) -> Tensor:
    """Returns the sum over ranks of the gradient of this rank's rows: [D p, ...] -> [p, ...]."""
    summed = all_reduce(grad.contiguous().clone(), axis)
    return summed.chunk(axis.size)[axis.rank]
