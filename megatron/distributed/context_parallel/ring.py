"""Ring attention (arXiv:2310.01889): keys and values pass from rank to rank, and each rank attends from its queries.

In step i of r a member of the ring has the keys and values of the member i before it, and already receives those of the
next step while it computes. Results of the steps are merged in fp32 by the logarithms of their sums. In the backward
pass keys and values pass around again, and behind them the sums of their gradients, in fp32; the last step brings these
home. A rank sends keys and values r - 1 times forward and r - 1 times backward, and gradients r - 1 times.

With the zigzag order of `sequence_shards.py` all queries of a rank see the first half of the keys of each rank before
it, and the second half of its queries sees all keys of each rank after it: a step is the same work on every rank.

Shapes: b micro batch, n query heads, m key/value heads, s sequence of a member, d head dim, r members of the ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.context_parallel.sequence_shards import SequenceShards
from megatron.distributed.mesh import Axis
from megatron.kernels.attention_blocks import Saved, Sight, block_backward, block_forward
from megatron.kernels.attention_patterns import AttentionMask, MaskPattern
from megatron.kernels.sink_attention import sink_gradient, with_sinks


class _Passing:
    """A tensor on its way to the next rank, and the one that comes from the rank before."""

    def __init__(self, sent: Tensor, axis: Axis) -> None:
        self._sent, self._received = sent, torch.empty_like(sent)
        after, before = (axis.ranks[(axis.rank + step) % axis.size] for step in (1, -1))
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, after, axis.group),
                dist.P2POp(dist.irecv, self._received, before, axis.group),
            ]
        )

    def wait(self) -> Tensor:
        """Returns what came."""
        for work in self._works:
            work.wait()
        return self._received


@dataclass(frozen=True)
class _Ring:
    """The steps of one attention."""

    shards: SequenceShards
    length: int
    """Sequence of a member [tokens]."""
    starts: Tensor | None
    """First key that each of this rank's queries may see, a position [b, s], or None."""
    pattern: MaskPattern | None

    @property
    def axis(self) -> Axis:
        return self.shards.ring

    def sight(self, step: int, bias: Tensor | None, device: torch.device) -> tuple[slice, slice, Sight]:
        """Returns the queries and keys that meet in a step, and what the queries see."""
        member = (self.axis.rank - step) % self.axis.size
        queries, keys = self._meeting(member)
        view = None if self.pattern is None and bias is None else AttentionMask(self.pattern, bias)
        sight = Sight(
            self.shards.ring_positions(self.length, self.axis.rank, device)[queries],
            self.shards.ring_positions(self.length, member, device)[keys],
            own=step == 0,
            starts=None if self.starts is None else self.starts[:, queries],
            view=view,
            length=self.length * self.axis.size,
        )
        return queries, keys, sight

    def sees(self, step: int) -> bool:
        """Whether the keys of a step are before any query; in shards that follow each other those of later ranks are
        not.
        """
        return self.shards.zigzag or step <= self.axis.rank

    def _meeting(self, member: int) -> tuple[slice, slice]:
        """Returns the queries and keys that meet where a member's keys have come."""
        every = slice(0, self.length)
        if not self.shards.zigzag:
            return every, every
        half = self.length // 2
        queries = slice(half if member > self.axis.rank else 0, self.length)
        return queries, slice(0, half if member < self.axis.rank else self.length)

    def passes_on(self, step: int) -> bool:
        """Whether the keys and values of a step are sent to the next rank."""
        return step < self.axis.size - 1


def _merge(out: Tensor, sums: Tensor, more: Tensor, more_sums: Tensor) -> None:
    """Merges the result of further keys into that of others, in place: [b, n, s, d] and [b, n, s]."""
    total = torch.logaddexp(sums, more_sums)
    out.mul_((sums - total).exp_()[..., None]).add_(more * (more_sums - total).exp_()[..., None])
    sums.copy_(total)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, ring: _Ring
    ) -> Tensor:
        pair = torch.stack((k, v))  # [2, b, m, s, d]
        out, sums = torch.empty(0), torch.empty(0)
        for step in range(ring.axis.size):
            passing = _Passing(pair, ring.axis) if ring.passes_on(step) else None
            queries, keys, sight = ring.sight(step, bias, q.device)
            if ring.sees(step) and not sight.empty():
                found = block_forward(q[:, :, queries], pair[0][:, :, keys], pair[1][:, :, keys], sight)
                if step == 0:
                    out, sums = found[0].to(found[1].dtype), found[1]
                else:
                    _merge(out[:, :, queries], sums[:, :, queries], *found)
            pair = pair if passing is None else passing.wait()
        if sinks is not None:
            out, sums = with_sinks(out, sums, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, bias, sinks, out, sums)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, None]:
        q, k, v, bias, sinks, out, sums = ctx.saved_tensors
        ring: _Ring = ctx.ring
        saved = Saved(q, sums, grads[0], out)
        grad_q, home = torch.zeros_like(q, dtype=sums.dtype), torch.empty(0)
        grad_bias = torch.zeros_like(bias, dtype=sums.dtype) if ctx.needs_input_grad[3] else None
        pair, behind = torch.stack((k, v)), None
        for step in range(ring.axis.size):
            passing = _Passing(pair, ring.axis) if ring.passes_on(step) else None
            total = torch.zeros_like(pair, dtype=sums.dtype)
            queries, keys, sight = ring.sight(step, bias, q.device)
            if ring.sees(step) and not sight.empty():
                part = block_backward(saved.rows(queries), pair[0][:, :, keys], pair[1][:, :, keys], sight, grad_bias)
                grad_q[:, :, queries] += part.q
                total[0][:, :, keys], total[1][:, :, keys] = part.k, part.v
            if step == 0:
                home = total
            else:
                behind = _Passing(total if behind is None else total.add_(behind.wait()), ring.axis)
            pair = pair if passing is None else passing.wait()
        grad_k, grad_v = home if behind is None else home.add_(behind.wait())
        of_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        of_sinks = None if sinks is None else sink_gradient(saved, sinks)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), of_bias, of_sinks, None


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shards: SequenceShards,
    starts: Tensor | None = None,
    view: AttentionMask | None = None,
) -> Tensor:
    """Causal attention over the ring: q [b, n, s, d], k and v [b, m, s, d] -> [b, n, s, d]. Collective.

    ValueError for a bound of scores, which it does not have.

    Args:
        q: queries of this member's part of the sequence.
        k: keys of the same positions.
        v: values likewise.
        shards: who has which positions.
        starts: first key that each query of the full sequence may see [b, r s]; 0 unless set.
        view: hides further keys, and has a bias by distance and sinks, which get gradients.
    """
    if view is not None and view.softcap is not None:
        raise ValueError("ring attention has no bound of scores (softcap)")
    length = q.shape[2]
    if starts is not None:
        starts = starts[:, shards.ring_positions(length, shards.ring.rank, q.device)]
    ring = _Ring(shards, length, starts, None if view is None else view.pattern)
    bias, sinks = (None, None) if view is None else (view.bias, view.sinks)
    out: Tensor = _RingAttention.apply(q, k, v, bias, sinks, ring)
    return out
