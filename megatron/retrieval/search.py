"""Exact search: the passages with the largest products, over blocks of a corpus.

Shapes: q questions, n passages, d width of an embedding, k results.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron.distributed.mesh import Axis
from megatron.distributed.process_group import all_gather_list

ROWS = 65_536
"""Passages that are compared at once."""
QUESTIONS = 1024
"""Questions that are compared at once."""


def nearest(questions: Tensor, vectors: np.ndarray, count: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Returns scores and numbers of the best passages, the best first: [q, k] and [q, k]. Collective over the axis.

    Of passages with the same score the first ones of the corpus are found, in their order.

    Args:
        questions: embeddings in fp32 [q, d].
        vectors: embeddings of the corpus [n, d].
        count: k; at most n are found.
        axis: ranks that share the corpus out.
    """
    count = min(count, len(vectors))
    first, last = (len(vectors) * rank // axis.size for rank in (axis.rank, axis.rank + 1))
    own = _nearest(questions, vectors[first:last], count, first)
    scores, numbers = zip(*all_gather_list(own, axis.group), strict=True) if axis.size > 1 else ((own[0],), (own[1],))
    return best(torch.cat(scores, 1), torch.cat(numbers, 1), count)


def _nearest(questions: Tensor, vectors: np.ndarray, count: int, first: int) -> tuple[Tensor, Tensor]:
    """The best of a share of the corpus, whose first passage has the number `first`."""
    scores, numbers = questions.new_empty(len(questions), 0), questions.new_empty(len(questions), 0).long()
    for start in range(0, len(vectors), ROWS):
        block = torch.from_numpy(np.array(vectors[start : start + ROWS], np.float32)).to(questions.device)
        parts = [first_best(part @ block.t(), min(count, len(block))) for part in questions.split(QUESTIONS)]
        scores = torch.cat([scores, torch.cat([part[0] for part in parts])], 1)
        numbers = torch.cat([numbers, torch.cat([part[1] for part in parts]) + first + start], 1)
        scores, numbers = best(scores, numbers, count)
    return scores.cpu(), numbers.cpu()


def first_best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of all passages of a block [q, n] the best ones [q, k]: scores and columns, of equal scores the first columns.

    torch.topk finds any of the passages that are equal to the last one; rows with more of them are counted out again.
    They are in no certain order.
    """
    values, columns = scores.topk(count)
    least = values[:, -1:]
    tied = (scores >= least).sum(1) > count
    if tied.any():
        own, last = scores[tied], least[tied]
        better, equal = own > last, own == last
        chosen = better | (equal & (equal.cumsum(1) + better.sum(1, keepdim=True) <= count))
        columns[tied] = chosen.nonzero()[:, 1].view(-1, count)
        values[tied] = own.gather(1, columns[tied])
    return values, columns


def best(scores: Tensor, numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of candidates [q, c] the best ones, the best first; of those with the same score the first number."""
    order = numbers.argsort(1)
    scores, numbers = scores.gather(1, order), numbers.gather(1, order)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return scores.gather(1, order), numbers.gather(1, order)
