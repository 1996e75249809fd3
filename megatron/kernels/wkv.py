"""Reference implementation of RWKV-6's kernel: linear attention whose state decays by channel and position.

For every head, with receptance r, key k, value v, decay w in (0, 1) and bonus u (arXiv:2404.05892, equation 17):

    y[t] = r[t] (S[t - 1] + (u k[t]) v[t]ᵀ)        S[t] = diag(w[t]) S[t - 1] + k[t] v[t]ᵀ

Chunks of positions are computed at once. Inside a chunk position j contributes to t through the product of the decays
between them, computed as the exponential of a difference of sums of logarithms, which is never positive; S connects
chunks.

Shapes: b batch, s sequence, n heads of this rank, d head dim, c positions of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 16


def wkv(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor,
    state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """r, k, v, log_decay [b, s, n, d], bonus [n, d] -> y [b, s, n, d] and the last S [b, n, d, d], all in fp32.

    Args:
        r: receptance.
        k: key.
        v: value.
        log_decay: logarithm of the decay.
        bonus: u.
        state: S before the first position.
        starts: first position that each position sees [b, s].
    """
    wide = torch.promote_types(r.dtype, torch.float32)
    r, k, v, log_decay = (value.to(wide) for value in (r, k, v, log_decay))
    batch, length, heads, width = r.shape
    state = r.new_zeros(batch, heads, width, width) if state is None else state.to(wide)
    parts = []
    for first in range(0, length, CHUNK):
        part = slice(first, min(first + CHUNK, length))
        seen = None if starts is None else starts[:, part] - first
        y, state = _chunk(r[:, part], k[:, part], v[:, part], log_decay[:, part], bonus, state, seen)
        parts.append(y)
    return torch.cat(parts, dim=1), state


def _chunk(
    r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Computes one chunk; starts count from its first position, negative if a document began earlier."""
    length = r.shape[1]
    sums = log_decay.cumsum(1)  # [b, c, n, d]
    before = sums - log_decay  # decay up to position t
    at = torch.arange(length, device=r.device)
    past = (at[None, :] < at[:, None])[None]  # [1, t, j]
    if starts is not None:
        past = past & (at >= starts.unsqueeze(-1))
    fade = before[:, :, None] - sums[:, None]  # [b, t, j, n, d]
    fade = fade.masked_fill(~past[..., None, None], float("-inf")).exp()
    scores = torch.einsum("btnd,bjnd,btjnd->btjn", r, k, fade)
    now = (r * bonus * k).sum(-1, keepdim=True)  # [b, t, n, 1]
    y = torch.einsum("btjn,bjnd->btnd", scores, v) + now * v
    carried = before.exp()
    ends = sums[:, -1:] - sums  # decay from position j to the end of the chunk
    left = ends.exp()
    decay = sums[:, -1].exp()  # [b, n, d]
    if starts is not None:
        carried = carried * (starts < 0)[..., None, None]
        left = left * (at >= starts[:, -1:])[..., None, None]
        decay = decay * (starts[:, -1] < 0)[:, None, None]
    y = y + torch.einsum("btnd,bnde->btne", r * carried, state)
    state = decay.unsqueeze(-1) * state + torch.einsum("bjnd,bjne->bnde", k * left, v)
    return y, state
