"""State space duality, the recurrence of Mamba-2 (arXiv:2405.21060): every head has one decay for its whole state.

For each head, with input x [p], step dt, decay rate A < 0 and the group's B and C [n]:

    S[t] = exp(dt A) S[t - 1] + dt x[t] B[t]ᵀ        y[t] = S[t] C[t]

Chunks of positions are computed at once (section 6): inside a chunk by masked products as in attention, between chunks
by the state. The decay between two positions is the exponential of a difference of sums, taken in float64 so that long
sums lose nothing. The backward pass computes the chunks again, so that only the inputs are left.

Shapes: b batch, s sequence, h heads of this rank, p features of a head, g groups of this rank, r heads of a group,
n state, c chunks, l positions of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def chunk_scan(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns y [b, s, h, p] and the last S [b, h, p, n] from S = 0, in fp32 or the wider type of x.

    Args:
        x: [b, s, h, p].
        step: dt [b, s, h]; a position with 0 changes nothing.
        rate: A [h].
        into: B [b, s, g, n].
        out: C [b, s, g, n].
        resets: positions before which S becomes 0 [b, s].
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    inputs = [value.to(wide) for value in (x, step, rate, into, out)]
    y, last = _Chunks.apply(*inputs, resets)
    return y, last


def reached(step: Tensor, rate: Tensor, resets: Tensor | None = None) -> Tensor:
    """Returns the part of an earlier state that each position still has, [b, s, h]; 0 from the first reset on."""
    left = torch.exp((step * rate).cumsum(1))
    return left if resets is None else left.masked_fill(resets.cumsum(1).unsqueeze(-1) > 0, 0)


def add_state(y: Tensor, last: Tensor, state: Tensor, left: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the results of `chunk_scan` as they are after an earlier state.

    Args:
        y: [b, s, h, p], from S = 0.
        last: [b, h, p, n], from S = 0.
        state: S before the first position [b, h, p, n].
        left: its part at each position, of `reached` [b, s, h].
        out: C [b, s, g, n].
    """
    by_group = state.unflatten(1, (out.shape[2], -1))  # [b, g, r, p, n]
    read = torch.einsum("bsgn,bgrpn->bsgrp", out.to(y.dtype), by_group).flatten(2, 3)  # [b, s, h, p]
    return y + left.unsqueeze(-1) * read, last + left[:, -1, :, None, None] * state


def one_step(x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One position: returns y [b, h, p] and the next S.

    Args:
        x: [b, h, p].
        step: [b, h].
        rate: [h].
        into: [b, g, n].
        out: [b, g, n].
        state: [b, h, p, n].
    """
    heads = x.shape[1] // into.shape[1]
    into, out = (value.to(state.dtype).repeat_interleave(heads, 1).unsqueeze(2) for value in (into, out))
    fed = (step.unsqueeze(-1) * x).unsqueeze(-1) * into  # [b, h, p, n]
    state = torch.addcmul(fed, torch.exp(step * rate)[:, :, None, None], state)
    return (state @ out.transpose(2, 3)).squeeze(-1), state


class _Chunks(torch.autograd.Function):
    """`_chunks`, of which autograd keeps the inputs alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.resets = inputs[-1]
        ctx.save_for_backward(*inputs[:-1])
        return _chunks(*inputs[:-1], resets=inputs[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [
            value.detach().requires_grad_(needed)
            for value, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        with torch.enable_grad():
            results = _chunks(*inputs, resets=ctx.resets)
        trained = [value for value in inputs if value.requires_grad]
        found = iter(torch.autograd.grad(results, trained, grads))
        return (*(next(found) if value.requires_grad else None for value in inputs), None)


def _chunks(
    x: Tensor, step: Tensor, rate: Tensor, into: Tensor, out: Tensor, *, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    length, groups = x.shape[1], into.shape[2]
    size = min(CHUNK, length)
    padding = -length % size
    x, step, into, out = (_in_chunks(value, size, padding) for value in (x, step, into, out))
    fed = (x * step.unsqueeze(-1)).unflatten(3, (groups, -1))  # [b, c, l, g, r, p]
    sums = (step * rate).double().cumsum(2)  # [b, c, l, h]
    documents = None if resets is None else _in_chunks(resets, size, padding).cumsum(2)  # [b, c, l]
    into, out = into.transpose(2, 3), out.transpose(2, 3)  # [b, c, g, l, n]
    y = _inside(fed, sums, into, out, documents)  # [b, c, l, g, r, p]
    to_end = torch.exp((sums[:, :, -1:] - sums).to(x.dtype))  # [b, c, l, h]
    left, begun = torch.exp(sums[:, :, -1].to(x.dtype)), torch.exp(sums.to(x.dtype))  # [b, c, h], [b, c, l, h]
    if documents is not None:
        to_end = to_end.masked_fill((documents != documents[:, :, -1:]).unsqueeze(-1), 0)
        left = left.masked_fill((documents[:, :, -1:] > 0), 0)
        begun = begun.masked_fill((documents > 0).unsqueeze(-1), 0)
    ends = (fed * to_end.unflatten(3, (groups, -1)).unsqueeze(-1)).permute(0, 1, 3, 4, 5, 2)  # [b, c, g, r, p, l]
    added = (ends.flatten(3, 4) @ into).unflatten(3, fed.shape[4:]).flatten(2, 3)  # [b, c, h, p, n]
    states = [torch.zeros_like(added[:, 0])]
    parts = zip(added.unbind(1), left.unbind(1), strict=True)  # the gradient of an index would be a full tensor
    for more, part in parts:
        states.append(torch.addcmul(more, part[:, :, None, None], states[-1]))
    if len(states) > 2:
        before = torch.stack(states[1:-1], 1).unflatten(2, (groups, -1)).flatten(3, 4)  # [b, c - 1, g, r p, n]
        read = (out[:, 1:] @ before.transpose(3, 4)).unflatten(4, fed.shape[4:])  # [b, c - 1, g, l, r, p]
        read = read.transpose(2, 3) * begun[:, 1:].unflatten(3, (groups, -1)).unsqueeze(-1)
        y = torch.cat((y[:, :1], y[:, 1:] + read), 1)
    return y.flatten(3, 4).flatten(1, 2)[:, :length], states[-1]


def _in_chunks(value: Tensor, size: int, padding: int) -> Tensor:
    """[b, s, ...] -> [b, c, l, ...], padded by zeros."""
    if padding:
        value = F.pad(value, (0,) * (2 * (value.dim() - 2)) + (0, padding))
    return value.unflatten(1, (-1, size))


def _inside(fed: Tensor, sums: Tensor, into: Tensor, out: Tensor, documents: Tensor | None) -> Tensor:
    """Returns what positions of a chunk see of each other.

    Args:
        fed: dt x [b, c, l, g, r, p].
        sums: of dt A from the first position of the chunk on [b, c, l, h].
        into: B [b, c, g, l, n].
        out: C [b, c, g, l, n].
        documents: resets of the chunk up to each position [b, c, l].
    """
    size = fed.shape[2]
    sums = sums.transpose(2, 3)  # [b, c, h, l]
    hidden = torch.ones(size, size, dtype=torch.bool, device=fed.device).triu(1)
    if documents is not None:
        hidden = hidden | (documents.unsqueeze(3) != documents.unsqueeze(2)).unsqueeze(2)  # [b, c, 1, l, l]
    decay = (sums.unsqueeze(4) - sums.unsqueeze(3)).to(fed.dtype).masked_fill(hidden, -torch.inf).exp()
    scores = (out @ into.transpose(3, 4)).unsqueeze(3) * decay.unflatten(2, (fed.shape[3], -1))  # [b, c, g, r, l, l]
    return (scores @ fed.permute(0, 1, 3, 4, 2, 5)).permute(0, 1, 4, 2, 3, 5)
