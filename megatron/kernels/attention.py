"""The attention core: softmax(q kᵀ / sqrt(d)) v under a causal mask.

Here are the plain formula, the backends of torch's scaled_dot_product_attention and the cores of a CPU and a GPU that
take every case; the packages are in flash_attention.py, the core of the fused softmax in softmax_attention.py. Which of
them serves a model says `megatron/registry/attention.py`.

Keys may be longer than queries: with a key/value cache the queries are the last positions, so query i sees the keys up
to position (keys - queries + i). Fewer key/value heads than query heads means grouped queries (arXiv:2305.13245): head
i reads key/value head i // group; no kernel here copies the shared heads.

For sequences of several documents, `starts` gives the start of each query's document; earlier keys are hidden. A `view`
hides further keys and adds biases to scores (see attention_patterns.py). Without either no mask is created if the
kernel needs none.

Shapes: b micro batch, n query heads, m key/value heads (n = g * m), s queries, k keys, d head dim. Inputs may be
strided views; the result is [b, n, s, d].
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.kernels.attention_patterns import AttentionMask
from megatron.kernels.blocked_attention import blocked_attention
from megatron.kernels.cpp_attention import cpp_attention, cpp_attention_unavailable
from megatron.kernels.flex_attention import flex_attention, flex_unavailable


class AttentionKernel(Protocol):
    """(q [b, n, s, d], k [b, m, k, d], v [b, m, k, d], dropout probability, starts [b, s] or None) -> [b, n, s, d]."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout: float = 0.0,
        starts: Tensor | None = None,
        view: AttentionMask | None = None,
    ) -> Tensor: ...


def visible(
    queries: int, keys: int, device: torch.device, starts: Tensor | None = None, view: AttentionMask | None = None
) -> Tensor:
    """Returns true where the query sees the key: [queries, keys], or [b or 1, n or 1, queries, keys] with starts or
    a view.

    Args:
        queries: Number of queries, which are the last positions.
        keys: Number of keys.
        device: Device of the result.
        starts: The first key that each query may see, [b, queries].
        view: Mask besides the causal one.
    """
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if view is not None and view.pattern is not None:
        seen = view.seen(*_positions(queries, keys, device))
    if starts is None:
        return seen
    return seen & (torch.arange(keys, device=device) >= starts[:, None, :, None])  # [b, 1, s, k]


def _positions(queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns positions of the queries [1, s, 1] and of the keys [1, 1, k]."""
    positions = torch.arange(keys, device=device)
    return positions[None, keys - queries :, None], positions[None, None]


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    starts: Tensor | None = None,
    view: AttentionMask | None = None,
) -> Tensor:
    """Reference implementation: the formula with scores and softmax in fp32.

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, keys, d].
        v: Values [b, m, keys, d].
        dropout: Dropout of the probabilities.
        starts: The first key that each query may see, [b, s].
        view: Mask besides the causal one.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])  # [b, n, s, k]
    scores = scores if view is None else view.capped(scores)
    if view is not None and view.bias is not None:
        scores = scores + view.scores(*_positions(q.shape[2], k.shape[2], q.device))
    scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], q.device, starts, view), float("-inf"))
    weights = F.dropout(scores.softmax(-1) if view is None else view.softmax(scores), dropout, training=dropout > 0)
    return weights.to(v.dtype) @ v  # [b, n, s, d]


def _by_formula(view: AttentionMask) -> bool:
    """Returns whether scores have a bound or sinks, which torch's scaled_dot_product_attention has not."""
    return view.softcap is not None or view.sinks is not None


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    starts: Tensor | None = None,
    view: AttentionMask | None = None,
) -> Tensor:
    """Attention by torch's scaled_dot_product_attention, which selects its backend (flash, memory-efficient or plain).

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, keys, d].
        v: Values [b, m, keys, d].
        dropout: Dropout of the probabilities.
        starts: The first key that each query may see, [b, s].
        view: Mask besides the causal one.
    """
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if view is not None and (view.bias is not None or _by_formula(view)):  # coarse in low precision
        return plain_attention(q, k, v, dropout, starts, view)
    if starts is None and view is None and (queries == keys or queries == 1):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=queries > 1, enable_gqa=grouped)
    mask = visible(queries, keys, q.device, starts, view)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=grouped)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, view: AttentionMask | None = None) -> Tensor:
    """Attention of cached rows under a given mask; scores with a bound or sinks by the plain formula.

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, keys, d].
        v: Values [b, m, keys, d].
        mask: [b or 1, n or 1, s, keys]; bool shows keys, float is added to the scores.
        view: Has the bound of the scores and the sinks, if there are any.
    """
    if view is not None and _by_formula(view):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = view.capped((q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1]))  # [b, n, s, keys]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return view.softmax(scores).to(v.dtype) @ v
    mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    starts: Tensor | None = None,
    view: AttentionMask | None = None,
) -> Tensor:
    """The compiled kernel, else blocked attention, for full sequences; torch's for cached attention or dropout.

    Sinks take the plain formula.

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, keys, d].
        v: Values [b, m, keys, d].
        dropout: Dropout of the probabilities.
        starts: The first key that each query may see, [b, s].
        view: Mask besides the causal one.
    """
    if dropout == 0 and 1 < q.shape[2] == k.shape[2]:
        if cpp_attention_unavailable(q, k, view) is None:
            return cpp_attention(q, k, v, starts, view)
        if view is None or view.sinks is None:
            return blocked_attention(q, k, v, starts, view)
    return sdpa_attention(q, k, v, dropout, starts, view)


def gpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    starts: Tensor | None = None,
    view: AttentionMask | None = None,
) -> Tensor:
    """Torch's flexible attention, which skips hidden blocks, where documents or a view hide keys; else torch's choice.

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, keys, d].
        v: Values [b, m, keys, d].
        dropout: Dropout of the probabilities.
        starts: The first key that each query may see, [b, s].
        view: Mask besides the causal one.
    """
    if (view is None and starts is None) or flex_unavailable(q, k, dropout) is not None:
        return sdpa_attention(q, k, v, dropout, starts, view)
    return flex_attention(q, k, v, starts, view or AttentionMask())


def _prefers(first: SDPBackend) -> AbstractContextManager[object]:
    """Returns the context in which torch takes this backend for the cases that it can use it for, then others.

    A compiled graph takes torch's own order, which is the same (`PREFERS_CUDNN` of the registry).
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    rest = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel(list(dict.fromkeys([first, *rest])), set_priority=True)


@dataclass(frozen=True)
class TorchAttention:
    """Attention by one backend of torch where nothing besides the causal mask hides keys, else `gpu_attention`."""

    backend: SDPBackend

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout: float = 0.0,
        starts: Tensor | None = None,
        view: AttentionMask | None = None,
    ) -> Tensor:
        """The arguments of `gpu_attention`."""
        with _prefers(self.backend):
            return gpu_attention(q, k, v, dropout, starts, view)


cudnn_attention = TorchAttention(SDPBackend.CUDNN_ATTENTION)
torch_flash_attention = TorchAttention(SDPBackend.FLASH_ATTENTION)


def any_attention(device: torch.device) -> AttentionKernel:
    """Returns the core that takes every case on this device."""
    return cpu_attention if device.type == "cpu" else gpu_attention
