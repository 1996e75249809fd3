"""Routers: assign tokens to experts, with weights.

A router sees the logits of all tokens of a rank's micro batch, in fp32. The choice is not differentiable; the weights
are, and through them the router learns.

Shapes: n tokens, e experts, k experts of a token.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.mesh import Axis

TOLERANCE = 1e-4
"""Mean change of the experts' factors at which Sinkhorn's iteration ends."""

MOST_ITERATIONS = 1000


def topk(logits: Tensor, k: int, *, training: bool, axis: Axis, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Assigns the k experts of the highest probability, weighted by it (arXiv:1701.06538; k = 1: arXiv:2101.03961).

    The probabilities are a softmax over all experts. Returns weights [n, k] and experts [n, k].

    Args:
        logits: [n, e].
        k: Experts of a token.
        training: Not used; routers have one signature.
        axis: Not used; routers have one signature.
        real: Not used; routers have one signature.
    """
    weights, experts = logits.softmax(dim=-1).topk(k, dim=-1)
    return weights, experts


def sinkhorn(
    logits: Tensor, k: int, *, training: bool, axis: Axis, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """In training assigns by a balanced assignment (arXiv:2103.16716), otherwise by the highest logits.

    Balancing uses all tokens of a sequence, including later ones, so it cannot be used for generation. The weights are
    a sigmoid if k = 1 and a softmax over all experts otherwise. Returns weights [n, k] and experts [n, k].

    Args:
        logits: [n, e].
        k: Experts of a token.
        training: True in training, where assignments are balanced.
        axis: Ranks that share the sequences.
        real: False for padding, which is not balanced and goes to the highest logits, [n]; None where there is none.
    """
    scores = logits.sigmoid() if k == 1 else logits.softmax(dim=-1)
    chosen = logits.detach()
    if training:
        matrix = balanced(chosen, axis, real)
        chosen = matrix if real is None else torch.where(real[:, None], matrix, chosen)
    experts = chosen.topk(k, dim=-1).indices
    return scores.gather(1, experts), experts


@torch.no_grad()
def balanced(logits: Tensor, axis: Axis, real: Tensor | None = None) -> Tensor:
    """Returns Sinkhorn's matrix: exp(logits) scaled by a factor for each token and one for each expert.

    Each token then sums to 1/n and each expert to 1/e (Sinkhorn 1967), over the real tokens; padding has zeros.
    logits [n, e] -> [n, e]; real as for sinkhorn.
    """
    cost = (logits - logits.amax(dim=1, keepdim=True)).exp()
    tokens: int | Tensor = cost.shape[0] * axis.size
    if real is not None:
        cost = cost * real[:, None]
        tokens = real.sum(dtype=cost.dtype)
        if axis.size > 1:
            dist.all_reduce(tokens, group=axis.group)
        tokens = tokens.clamp(min=1)
    experts = cost.shape[1]
    columns = torch.ones_like(cost[0])
    for _ in range(MOST_ITERATIONS):
        rows = 1 / (tokens * (cost @ columns).clamp(min=1e-8))
        sums = rows @ cost
        if axis.size > 1:
            dist.all_reduce(sums, group=axis.group)
        before, columns = columns, 1 / (experts * sums.clamp(min=1e-8))
        if (before - columns).abs().mean() <= TOLERANCE:
            break
    return columns * cost * rows[:, None]
