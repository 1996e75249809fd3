"""The gated delta rule (arXiv:2412.06464): a state of each head that decays, and is corrected towards new values.

For each value head, with the state S [k, v], decay g <= 0 in logarithms, and strength b of the correction:

    S = exp(g) S;  S = S + k (b (v - S' k))';  y = S' q

``gated_delta_loop`` is that recurrence. ``gated_delta`` computes chunks of positions by matrix products (section 3.3 of
the paper; the WY form of arXiv:2406.06484): with G the sums of g inside a chunk, D[i, j] = exp(G[i] - G[j]) for j <= i,
and S the state before it,

    x = b (v - exp(G) k S)             what the state leaves to correct
    c = (1 + A)^-1 x                   corrections; A[i, j] = b[i] (k[i] k[j]) D[i, j] for j < i
    y = exp(G) q S + (q k' * D) c
    S = exp(G[last]) S + (exp(G[last] - G) k)' c

Only S and c go from chunk to chunk, so the loop over chunks has three products; all others, and their gradients, are
products over all chunks at once. A document that starts inside a chunk sees neither S nor the positions before it.

Shapes: b batch, s sequence, m key heads, r value heads of a key head, n chunks, c positions of a chunk, k width of
a key, v width of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Positions of a chunk."""
SHORT = 4
"""Up to so many positions the recurrence itself costs less than a chunk."""


@dataclass(frozen=True)
class DeltaInputs:
    """The inputs of every position."""

    q: Tensor
    """Queries [b, s, m, k]."""
    k: Tensor
    """Keys [b, s, m, k], of length 1."""
    v: Tensor
    """Values [b, s, m r, v]; value heads of one key head are beside each other."""
    decay: Tensor
    """g [b, s, m r]."""
    strength: Tensor
    """b [b, s, m r]."""


DeltaRule = Callable[[DeltaInputs, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""(inputs, state, starts, valid) -> y [b, s, m r, v] and the last state, as ``gated_delta``."""


def gated_delta(
    x: DeltaInputs, state: Tensor | None = None, starts: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns y [b, s, m r, v] and the last state [b, m r, k, v], in fp32, or fp64 for inputs of that type.

    Args:
        x: the inputs.
        state: before the first position [b, m r, k, v]; zeros if None.
        starts: first position that each position sees [b, s]; below 0 where that is before this part of the sequence.
        valid: valid positions [b, s]; the others do not change the state.
    """
    wide = torch.promote_types(x.q.dtype, torch.float32)
    q, k, v, decay, strength = (value.to(wide) for value in (x.q, x.k, x.v, x.decay, x.strength))
    if valid is not None:
        decay, strength = (torch.where(valid.unsqueeze(-1), value, 0) for value in (decay, strength))
    batch, length, heads, width = k.shape
    ratio, values = v.shape[2] // heads, v.shape[3]
    if state is None:
        state = q.new_zeros(batch, v.shape[2], width, values)
    state = state.to(wide).unflatten(1, (heads, ratio)).transpose(2, 3).flatten(3)  # [b, m, k, r v]
    if length <= SHORT and starts is None:
        y, last = _recurrence(DeltaInputs(q, k, v, decay, strength), state)
    else:
        y, last = _chunked(DeltaInputs(q, k, v, decay, strength), state, starts)
    return y, last.unflatten(3, (ratio, values)).transpose(2, 3).flatten(1, 2)


def gated_delta_loop(
    x: DeltaInputs, state: Tensor | None = None, starts: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Reference implementation of ``gated_delta``, position by position.

    Args:
        x: the inputs.
        state: before the first position [b, m r, k, v]; zeros if None.
        starts: first position that each position sees [b, s].
        valid: valid positions [b, s].
    """
    ratio = x.v.shape[2] // x.k.shape[2]
    q, k = (value.repeat_interleave(ratio, dim=2) for value in (x.q, x.k))
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], x.v.shape[3])
    out = []
    for at in range(q.shape[1]):
        before = state
        if starts is not None:
            state = torch.where((starts[:, at] == at)[:, None, None, None], 0, state)
        state = state * x.decay[:, at].exp()[..., None, None]
        known = torch.einsum("bhkv,bhk->bhv", state, k[:, at])
        change = x.strength[:, at].unsqueeze(-1) * (x.v[:, at] - known)
        state = state + k[:, at].unsqueeze(-1) * change.unsqueeze(-2)
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, at]))
        if valid is not None:
            state = torch.where(valid[:, at][:, None, None, None], state, before)
    return torch.stack(out, dim=1), state


def _recurrence(x: DeltaInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """A few positions, one by one; state as in ``_chunked``."""
    heads, values = x.k.shape[2], x.v.shape[3]
    v = x.v.unflatten(2, (heads, -1))  # [b, s, m, r, v]
    keep, strength = (part.unflatten(2, (heads, -1)) for part in (x.decay.exp(), x.strength))  # [b, s, m, r]
    out = []
    for at in range(v.shape[1]):
        state = state * keep[:, at].repeat_interleave(values, dim=-1).unsqueeze(-2)
        known = (x.k[:, at].unsqueeze(-2) @ state).unflatten(-1, (-1, values)).squeeze(2)  # [b, m, r, v]
        change = strength[:, at].unsqueeze(-1) * (v[:, at] - known)
        state = state + x.k[:, at].unsqueeze(-1) * change.flatten(2).unsqueeze(-2)
        out.append((x.q[:, at].unsqueeze(-2) @ state).squeeze(-2).unflatten(-1, (-1, values)).flatten(1, 2))
    return torch.stack(out, dim=1), state


def _chunked(x: DeltaInputs, state: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """All positions; the state is [b, m, k, r v], as the products take it."""
    length, heads = x.k.shape[1], x.k.shape[2]
    ratio = x.v.shape[2] // heads
    missing = -length % CHUNK

    def chunks(value: Tensor) -> Tensor:
        """[b, s, ...] -> [b, n, c, ...]; what is filled in changes no state."""
        filled = F.pad(value, (0, 0) * (value.dim() - 2) + (0, missing)) if missing else value
        return filled.unflatten(1, (-1, CHUNK))

    q, k = (chunks(part).permute(0, 1, 3, 2, 4) for part in (x.q, x.k))  # [b, n, m, c, k]
    v = chunks(x.v).unflatten(3, (heads, ratio)).permute(0, 1, 3, 4, 2, 5)  # [b, n, m, r, c, v]
    decay, strength = (
        chunks(part).unflatten(3, (heads, ratio)).permute(0, 1, 3, 4, 2) for part in (x.decay, x.strength)
    )
    if starts is not None:
        starts = torch.cat((starts, starts[:, -1:].expand(-1, missing)), dim=1).unflatten(1, (-1, CHUNK))
    y, last = _DeltaChunks.apply(q, k, v, decay, strength, state, starts)
    y = y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)  # [b, n c, m r, v]
    return y[:, :length], last


@dataclass(frozen=True)
class _Decays:
    """How much of what a position sees is left."""

    inside: Tensor
    """D [b, n, m, r, c, c]."""
    state: Tensor
    """exp(G) [b, n, m, r, c], of the state before the chunk at every position."""
    end: Tensor
    """exp(G[last] - G) [b, n, m, r, c], of every position after the chunk."""

    @staticmethod
    def of(decay: Tensor, starts: Tensor | None) -> _Decays:
        """Returns those of documents that begin at `starts` [b, n, c] of the sequence."""
        total = decay.cumsum(-1)
        size = decay.shape[-1]
        at = torch.arange(size, device=decay.device)
        seen = at <= at.unsqueeze(-1)  # [c, c]
        alive = torch.ones((), dtype=torch.bool, device=decay.device)
        if starts is not None:
            first = (
                starts - torch.arange(0, starts.shape[1] * size, size, device=starts.device)[:, None]
            )  # in its chunk
            seen = (seen & (at >= first.unsqueeze(-1)))[:, :, None, None]  # [b, n, 1, 1, c, c]
            alive = (first < 0)[:, :, None, None]  # [b, n, 1, 1, c]
        inside = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(~seen, float("-inf")).exp_()
        return _Decays(inside, total.exp() * alive, inside[..., -1, :])


class _DeltaChunks(torch.autograd.Function):
    """The chunks, with gradients by hand: D, and the products with it, are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, strength: Tensor, state: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        decays = _Decays.of(decay, starts)
        lower = (
            (k @ k.mT).unsqueeze(3) * decays.inside * strength.unsqueeze(-1)
        )  # its lower half without the diagonal: A
        one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, one, upper=False, unitriangular=True)
        del lower
        states = state.new_empty(v.shape[1], *state.shape)
        corrections = torch.empty_like(v, memory_format=torch.contiguous_format)
        for n in range(v.shape[1]):
            states[n] = state
            known = _by_head(k[:, n] @ state, v.shape[-1])  # [b, m, r, c, v]
            left = torch.addcmul(v[:, n], decays.state[:, n].unsqueeze(-1), known, value=-1)
            change = inverse[:, n] @ left.mul_(strength[:, n].unsqueeze(-1))
            corrections[:, n] = change
            decayed = _beside(change * decays.end[:, n].unsqueeze(-1))
            state = torch.baddbmm(
                (state * _last(decays, n, v.shape[-1])).flatten(0, 1), k[:, n].flatten(0, 1).mT, decayed.flatten(0, 1)
            ).view_as(state)
        scores = (q @ k.mT).unsqueeze(3) * decays.inside
        y = (
            _by_head(q @ states.transpose(0, 1), v.shape[-1])
            .mul_(decays.state.unsqueeze(-1))
            .add_(scores @ corrections)
        )
        ctx.save_for_backward(q, k, v, decay, strength, inverse, corrections, states, starts)
        return y, state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, strength, inverse, corrections, states, starts = ctx.saved_tensors
        grad_y, grad_state = grads
        width = v.shape[-1]
        decays = _Decays.of(decay, starts)
        states = states.transpose(0, 1)  # [b, n, m, k, r v]
        scores, similar = (q @ k.mT).unsqueeze(3), (k @ k.mT).unsqueeze(3)  # [b, n, m, 1, c, c]
        of_state = _beside(grad_y * decays.state.unsqueeze(-1))  # [b, n, m, c, r v]
        grad_change = (scores * decays.inside).mT @ grad_y  # [b, n, m, r, c, v]
        grad_into = torch.einsum("bnmck,bnmcv->bnmkv", q, of_state)
        grad_left, grad_ends = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(states)
        grad_known = torch.empty_like(of_state)
        for n in reversed(range(v.shape[1])):
            grad_ends[:, n] = grad_state
            grad_change[:, n].add_(_by_head(k[:, n] @ grad_state, width) * decays.end[:, n].unsqueeze(-1))
            grad_left[:, n] = inverse[:, n].mT @ grad_change[:, n]
            factor = (strength[:, n] * decays.state[:, n]).unsqueeze(-1)
            grad_known[:, n] = _beside(grad_left[:, n] * factor).neg_()
            grad_state = grad_state * _last(decays, n, width) + grad_into[:, n]
            grad_state = grad_state + k[:, n].mT @ grad_known[:, n]
        # gradients of the products over all chunks at once
        grad_q = of_state @ states.mT
        grad_k = grad_known @ states.mT
        grad_k += _beside(corrections * decays.end.unsqueeze(-1)) @ grad_ends.mT
        grad_scores = grad_y @ corrections.mT
        grad_lower = (grad_left @ corrections.mT).neg_().tril_(-1)
        grad_inside = (grad_scores * scores).addcmul_(grad_lower * similar, strength.unsqueeze(-1))
        grad_strength = (grad_lower * similar).mul_(decays.inside).sum(-1)
        grad_scores = (grad_scores * decays.inside).sum(3)  # [b, n, m, c, c]
        grad_similar = (grad_lower.mul_(decays.inside) * strength.unsqueeze(-1)).sum(3)
        grad_q += grad_scores @ k
        grad_k += grad_scores.mT @ q + (grad_similar + grad_similar.mT) @ k
        known = _by_head(k @ states, width)
        grad_strength += (grad_left * torch.addcmul(v, decays.state.unsqueeze(-1), known, value=-1)).sum(-1)
        grad_total = grad_inside.mul_(decays.inside)
        grad_total = grad_total.sum(-1) - grad_total.sum(-2)
        read = _by_head(q @ states, width)
        grad_total += ((grad_y * read).sum(-1) - (grad_left * known).sum(-1) * strength) * decays.state
        ends = _by_head(k @ grad_ends, width)
        grad_end = (corrections * ends).sum(-1) * decays.end
        grad_total -= grad_end
        grad_total[..., -1] += grad_end.sum(-1)
        remaining = (states * grad_ends).sum(-2).unflatten(-1, (-1, width)).sum(-1)  # [b, n, m, r]
        grad_total[..., -1] += remaining * decays.state[..., -1]
        grad_decay = grad_total.flip(-1).cumsum(-1).flip(-1)
        grad_v = grad_left * strength.unsqueeze(-1)
        return grad_q, grad_k, grad_v, grad_decay, grad_strength, grad_state, None


def _by_head(x: Tensor, width: int) -> Tensor:
    """[..., m, c, r v] -> [..., m, r, c, v]."""
    return x.unflatten(-1, (-1, width)).transpose(-3, -2)


def _beside(x: Tensor) -> Tensor:
    """[..., m, r, c, v] -> [..., m, c, r v]."""
    return x.transpose(-3, -2).flatten(-2)


def _last(decays: _Decays, n: int, width: int) -> Tensor:
    """Returns what is left of a state after a chunk, as a factor of [b, m, k, r v]."""
    return decays.state[:, n, :, :, -1].repeat_interleave(width, dim=-1).unsqueeze(-2)
