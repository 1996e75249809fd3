"""Routers: assign tokens to experts, with weights.

A router sees the logits of all tokens of a rank's micro batch, in fp32. The choice is not differentiable; the weights
are, and through them the router learns.

Shapes: n tokens, e experts, k experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.mesh import Axis

TOLERANCE = 1e-4
"""Mean change of the experts' factors at which Sinkhorn's iteration ends."""

MOST_ITERATIONS = 1000


@dataclass(frozen=True)
class RouterOptions:
    """How topk makes scores of logits, and which experts it may choose."""

    sigmoid: bool = False
    """Scores are a sigmoid of each logit; else a softmax."""
    pre_softmax: bool = True
    """The softmax is over all experts; else over the chosen ones."""
    groups: int = 1
    """Groups of neighbouring experts."""
    group_topk: int = 1
    """Groups that a token uses."""
    group_experts: int = 2
    """Experts with the highest scores of a group, whose sum is the group's score."""


PLAIN = RouterOptions()


def topk(
    logits: Tensor,
    k: int,
    *,
    training: bool,
    axis: Axis,
    real: Tensor | None = None,
    options: RouterOptions = PLAIN,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Assigns the k experts of the highest score, weighted by it (arXiv:1701.06538; k = 1: arXiv:2101.03961).

    With groups, only experts of the best groups are chosen (arXiv:2412.19437, section 2.1.2). Returns weights [n, k]
    and experts [n, k].

    Args:
        logits: [n, e].
        k: Experts of a token.
        training: Not used; routers have one signature.
        axis: Not used; routers have one signature.
        real: Not used; routers have one signature.
        options: Scores and groups.
        bias: Added to the scores for the choice, and not to the weights, [e]; None for none.
    """
    late = not (options.sigmoid or options.pre_softmax)
    scores = logits if late else probabilities(logits, options, normalized=False)
    choice = scores.detach() if bias is None else scores.detach() + bias
    if options.groups > 1:
        choice = _of_best_groups(choice, options)
    experts = choice.topk(k, dim=-1).indices
    weights = scores.gather(1, experts)
    return (weights.softmax(dim=-1) if late else weights), experts


def probabilities(logits: Tensor, options: RouterOptions, *, normalized: bool = True) -> Tensor:
    """Returns the scores of all experts, [n, e]; normalized: those of a token sum to 1, as the balance losses ask for.

    A softmax sums to 1 anyway.
    """
    if not options.sigmoid:
        return logits.softmax(dim=-1)
    scores = logits.sigmoid()
    return scores / scores.sum(dim=-1, keepdim=True) if normalized else scores


def _of_best_groups(choice: Tensor, options: RouterOptions) -> Tensor:
    """Returns the scores with those outside of a token's best groups at -inf, [n, e]."""
    grouped = choice.unflatten(-1, (options.groups, -1))  # [n, groups, e/groups]
    totals = grouped.topk(options.group_experts, dim=-1).values.sum(dim=-1)  # [n, groups]
    best = totals.topk(options.group_topk, dim=-1).indices
    chosen = torch.zeros_like(totals, dtype=torch.bool).scatter(1, best, True)
    return grouped.masked_fill(~chosen.unsqueeze(-1), float("-inf")).flatten(-2)


def sinkhorn(
    logits: Tensor,
    k: int,
    *,
    training: bool,
    axis: Axis,
    real: Tensor | None = None,
    options: RouterOptions = PLAIN,
    bias: Tensor | None = None,
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
        options: Not used; routers have one signature.
        bias: Not used; routers have one signature.
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
