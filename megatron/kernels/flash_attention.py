"""Attention by the flash-attn packages 2, 3 and 4, and by torch's flash kernel of several documents.

All of them take sliding windows, and documents as offsets into the joined rows (`documents.py`): no mask exists.
Version 2 computes ALiBi from its slopes and has dropout. What a package does not take (layouts of blocks, learned
biases) is served by `gpu_attention`; which package serves a model says `megatron/registry/attention.py`. Reference:
plain_attention.

The causal mask of the packages is aligned to the last key, as ours is: cached keys need no mask either. Their backward
pass is deterministic where torch is asked to be.

Shapes: b micro batch, n query heads, m key/value heads, s positions, d head dim, p = b s joined positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.kernels.activations import Activation
from megatron.kernels.attention import gpu_attention
from megatron.kernels.attention_patterns import AttentionMask, Window
from megatron.kernels.documents import DocumentOffsets, offsets_of

NO_WINDOW = -1


@dataclass(frozen=True)
class FlashRequest:
    """What a package is asked for besides the causal mask."""

    behind: int = NO_WINDOW
    """Keys before the query's own that it sees; -1 for all."""
    slopes: Tensor | None = None
    """Slopes of ALiBi, fp32 [n]."""
    dropout: float = 0.0
    """Dropout of the probabilities."""
    documents: DocumentOffsets | None = None
    """Documents in the joined rows; None for rows of their own."""
    softcap: float | None = None
    """Bound of the scores; None for none."""


class FlashCall(Protocol):
    """(q [b, s, n, d], k and v [b, keys, m, d]) -> [b, s, n, d]; with documents [p, n, d], [p, m, d] -> [p, n, d]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, request: FlashRequest) -> Tensor: ...


@dataclass(frozen=True)
class FlashAttention:
    """The attention core of a package."""

    call: FlashCall
    """Calls the package."""
    has_slopes: bool = False
    """Whether it computes ALiBi."""
    has_dropout: bool = False
    """Whether it has dropout."""
    joined: bool = False
    """Whether it takes joined rows only."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout: float = 0.0,
        starts: Tensor | None = None,
        view: AttentionMask | None = None,
    ) -> Tensor:
        """Calls the package, or `gpu_attention` for what it does not take: [b, n, s, d].

        Args:
            q: Queries [b, n, s, d].
            k: Keys [b, m, keys, d].
            v: Values [b, m, keys, d].
            dropout: Dropout of the probabilities.
            starts: The first key that each query may see, [b, s].
            view: Mask besides the causal one.
        """
        batch, _, length, _ = q.shape
        request = self._request(dropout, view)
        cached = length != k.shape[2]
        if request is None or (cached and (self.joined or starts is not None)):
            return gpu_attention(q, k, v, dropout, starts, view)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b, s, n, d]
        if starts is None and not self.joined:
            return self.call(q, k, v, request).transpose(1, 2)  # [b, n, s, d]
        documents = DocumentOffsets.of_rows(batch, length, q.device) if starts is None else offsets_of(starts)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [p, n, d]
        out = self.call(q, k, v, replace(request, documents=documents))
        return out.unflatten(0, (batch, length)).transpose(1, 2)  # [b, n, s, d]

    def _request(self, dropout: float, view: AttentionMask | None) -> FlashRequest | None:
        """Returns what the package is asked for; None for what it does not take."""
        if dropout > 0 and not self.has_dropout:
            return None
        if view is None:
            return FlashRequest(dropout=dropout)
        if view.bias is not None and not (self.has_slopes and view.slopes is not None):
            return None
        if (view.softcap is not None and self.joined) or not isinstance(view.pattern, Window | None):
            return None
        behind = NO_WINDOW if view.pattern is None else view.pattern.width - 1
        return FlashRequest(behind, view.slopes, dropout, softcap=view.softcap)


def _call_2(q: Tensor, k: Tensor, v: Tensor, request: FlashRequest) -> Tensor:
    import flash_attn

    extra = {"dropout_p": request.dropout, "alibi_slopes": request.slopes}
    return _call_package(flash_attn, q, k, v, request, NO_WINDOW, **extra)


def _call_3(q: Tensor, k: Tensor, v: Tensor, request: FlashRequest) -> Tensor:
    import flash_attn_interface

    return _call_package(flash_attn_interface, q, k, v, request, NO_WINDOW)


def _call_4(q: Tensor, k: Tensor, v: Tensor, request: FlashRequest) -> Tensor:
    from flash_attn import cute

    return _call_package(cute, q, k, v, request, None)


def _call_package(
    package: Any, q: Tensor, k: Tensor, v: Tensor, request: FlashRequest, unlimited: int | None, **extra: Any
) -> Tensor:
    """Calls the function of rows, or that of documents, which all versions name alike.

    Args:
        package: The module of the version.
        q: Queries.
        k: Keys.
        v: Values.
        request: What is asked for.
        unlimited: How the version writes a window without a limit.
        extra: Options of this version alone.
    """
    options = {
        "causal": True,
        "window_size": (unlimited, unlimited) if request.behind == NO_WINDOW else (request.behind, 0),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **({} if request.softcap is None else {"softcap": request.softcap}),  # releases before 2.6 do not have it
        **extra,
    }
    if request.documents is None:
        return _output(package.flash_attn_func(q, k, v, **options))
    return _output(package.flash_attn_varlen_func(q, k, v, **_lengths(request.documents), **options))


def _call_torch(q: Tensor, k: Tensor, v: Tensor, request: FlashRequest) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert request.documents is not None
    offsets, longest = request.documents.offsets, request.documents.longest
    window = (request.behind, 0)  # (-1, 0) is the causal mask
    grouped = q.shape[1] != k.shape[1]
    out: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=window, enable_gqa=grouped)
    return _output(out)


def _lengths(documents: DocumentOffsets) -> dict[str, Tensor | int]:
    return {
        "cu_seqlens_q": documents.offsets,
        "cu_seqlens_k": documents.offsets,
        "max_seqlen_q": documents.longest,
        "max_seqlen_k": documents.longest,
    }


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Returns the output of versions that return it alone or before the logarithms of the sums."""
    return result if isinstance(result, Tensor) else result[0]


flash_2_attention = FlashAttention(_call_2, has_slopes=True, has_dropout=True)
flash_3_attention = FlashAttention(_call_3)
flash_4_attention = FlashAttention(_call_4)
varlen_attention = FlashAttention(_call_torch, joined=True)


def flash_swiglu_of(name: str, formula: Activation) -> Activation:
    """Returns flash-attn's swiglu, which multiplies its second argument by the activated first."""
    from flash_attn.ops.activations import swiglu

    def fused(x: Tensor) -> Tensor:
        up, gate = x.chunk(2, dim=-1)
        y: Tensor = swiglu(gate, up)
        return y

    return fused
