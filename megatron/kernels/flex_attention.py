"""Attention by torch.nn.attention.flex_attention, compiled on a GPU: blocks of hidden keys are never computed.

The block mask of a view is created once for each length, and once a batch with document masks. Reference:
plain_attention.

Shapes: b micro batch, n query heads, m key/value heads, s positions, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from megatron.kernels.attention_patterns import AttentionMask, BlockPattern, MaskPattern

ATTRIBUTE = "neox_block_masks"


def flex_unavailable(q: Tensor, k: Tensor, dropout: float) -> str | None:
    """Returns the reason why flexible attention cannot be used, or None."""
    if dropout > 0:
        return "Flexible attention has no dropout."
    if q.shape[2] != k.shape[2]:
        return "Flexible attention is for full sequences; cached rows have a mask of their own."
    if q.shape[-1] < 16:
        return f"Flexible attention is for heads of at least 16 features, not {q.shape[-1]}."
    return None


def flex_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, view: AttentionMask) -> Tensor:
    """Attention under the causal mask and a view, [b, n, s, d]; see attention_patterns.

    Args:
        q: Queries [b, n, s, d].
        k: Keys [b, m, s, d].
        v: Values [b, m, s, d].
        starts: The first key that each query may see, [b, s].
        view: Mask besides the causal one.
    """
    length = q.shape[2]
    hidden = _block_mask(view, length, q.device, starts, q.shape[0], q.shape[1])
    attend: Any = _compiled() if q.device.type == "cuda" else flex.flex_attention
    bias = None if view.bias is None else view.bias.to(torch.float32)
    out: Tensor = attend(
        q, k, v, score_mod=_changed(bias, view.softcap), block_mask=hidden, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out


def _changed(
    bias: Tensor | None, softcap: float | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """Returns the function that flexible attention applies to each score: the bound, then the bias."""
    if bias is None and softcap is None:
        return None

    def changed(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if bias is None else score + bias[head, (query - key).clamp(min=0)]

    return changed


def _block_mask(
    view: AttentionMask, length: int, device: torch.device, starts: Tensor | None, batch: int, heads: int
) -> flex.BlockMask:
    """Returns the block mask of a view and document starts; without starts it is created once.

    With starts it is created once for all blocks with one pattern, and attached to the starts of the batch.
    """
    if starts is None:
        return _lasting_mask(view.pattern, length, device, heads)
    known: dict[object, flex.BlockMask] = vars(starts).setdefault(ATTRIBUTE, {})
    if view.pattern not in known:
        shown, own = _shown(view.pattern, length, device)
        first = starts.detach()  # without what is attached, so that nothing refers to itself

        def in_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return shown(row, head, query, key) & (key >= first[row, query])

        known[view.pattern] = flex.create_block_mask(
            in_document, batch, heads if own else None, length, length, device=device
        )
    return known[view.pattern]


@lru_cache(maxsize=64)
def _lasting_mask(pattern: MaskPattern | None, length: int, device: torch.device, heads: int) -> flex.BlockMask:
    shown, own = _shown(pattern, length, device)
    return flex.create_block_mask(shown, None, heads if own else None, length, length, device=device)


def _shown(pattern: MaskPattern | None, length: int, device: torch.device) -> tuple[Callable[..., Tensor], bool]:
    """Returns (predicate whether a position is visible, whether heads differ)."""
    if pattern is None:
        return lambda row, head, query, key: key <= query, False
    if not isinstance(pattern, BlockPattern):
        return lambda row, head, query, key: (key <= query) & pattern.sees(query, key), False
    size = pattern.layout.block
    cells = pattern.table(-(-length // size), device)  # bool [heads or 1, rows, rows]
    own = cells.shape[0] > 1

    def shown(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & cells[head if own else head * 0, query // size, key // size]

    return shown, own


@cache
def _compiled() -> Callable[..., Tensor]:
    """Returns the function, compiled on first use; from the second length on torch compiles a version for every
    length.
    """
    return torch.compile(flex.flex_attention)
