"""Reference implementations of Mamba's kernels: depthwise causal convolution and selective scan (arXiv:2312.00752).

Both can be reset at the starts of documents, and continued from the state of earlier positions.

Shapes: b batch, s sequence, d channels of this rank, n state of a channel, w width of the convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, starts: Tensor | None = None
) -> Tensor:
    """y[t] = sum over i of weight[w - 1 - i] x[t - i] + bias, for each channel. Returns [b, s, d].

    Args:
        x: [b, s, d].
        weight: [d, w].
        bias: [d].
        before: earlier inputs [b, w - 1, d]; zeros at the start.
        starts: first position that each position sees [b, s].
    """
    width, length = weight.shape[1], x.shape[1]
    padded = torch.cat((before.to(x.dtype), x), dim=1)  # [b, w - 1 + s, d]
    if starts is None and length == 1:  # a product and a sum take less time than a convolution's call
        y = (padded * weight.t()).sum(1, keepdim=True)
        return y if bias is None else y + bias
    if starts is None:
        y = F.conv1d(padded.transpose(1, 2), weight.unsqueeze(1), bias, groups=weight.shape[0])
        return y.transpose(1, 2)
    at = torch.arange(length, device=x.device)
    y = x * weight[:, width - 1]
    for back in range(1, width):
        seen = (at - back >= starts).unsqueeze(-1)  # [b, s, 1]
        shifted = padded[:, width - 1 - back : width - 1 - back + length]
        y = y + torch.where(seen, shifted, 0) * weight[:, width - 1 - back]
    return y if bias is None else y + bias


def linear_scan(keep: Tensor, add: Tensor) -> Tensor:
    """h[t] = keep[t] h[t - 1] + add[t] along dimension 1, from h = 0: [b, s, ...] -> [b, s, ...].

    By doubling (Hillis and Steele 1986): after i rounds every position has the sum of the last 2^i. With keep in [0, 1]
    no intermediate value can grow.
    """
    length, distance = add.shape[1], 1
    while distance < length:
        add = torch.cat(
            (
                add[:, :distance],
                add[:, distance:] + keep[:, distance:] * add[:, :-distance],
            ),
            dim=1,
        )
        if 2 * distance < length:
            keep = torch.cat((keep[:, :distance], keep[:, distance:] * keep[:, :-distance]), dim=1)
        distance *= 2
    return add


def selective_scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    into: Tensor,
    out: Tensor,
    skip: Tensor,
    state: Tensor | None = None,
    resets: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The state space of each channel, in fp32: h[t] = exp(step rate) h[t - 1] + step into x; y = out h + skip x.

    Returns y [b, s, d] and the last h [b, d, n].

    Args:
        x: [b, s, d].
        step: [b, s, d].
        rate: A [d, n].
        into: B [b, s, n].
        out: C [b, s, n].
        skip: D [d].
        state: h before the first position [b, d, n].
        resets: positions at which h starts from zero [b, s].
        valid: valid positions [b, s]; the others do not change h.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, step, into, out = (value.to(wide) for value in (x, step, into, out))
    keep = torch.exp(step.unsqueeze(-1) * rate)  # [b, s, d, n]
    add = (step * x).unsqueeze(-1) * into.unsqueeze(2)
    if resets is not None:
        keep = keep.masked_fill(resets[:, :, None, None], 0)
    if valid is not None:
        keep = torch.where(valid[:, :, None, None], keep, 1)
        add = torch.where(valid[:, :, None, None], add, 0)
    if state is not None:
        add = torch.cat((add[:, :1] + keep[:, :1] * state.to(wide).unsqueeze(1), add[:, 1:]), dim=1)
    states = linear_scan(keep, add)  # [b, s, d, n]
    y = torch.einsum("bsdn,bsn->bsd", states, out) + skip * x
    return y, states[:, -1]
