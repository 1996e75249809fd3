"""Masks besides the causal mask, and biases of attention scores.

A pattern hides keys: a sliding window, or blocks by a layout. A bias is added to the score of a query and a key by
their distance alone, as in ALiBi (arXiv:2108.12409) and T5's relative positions (arXiv:1910.10683).

Shapes: b batch, n query heads of a call, s queries, k keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class MaskPattern(Protocol):
    """The keys that the queries of some heads see; later keys are always hidden."""

    def __hash__(self) -> int: ...

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Returns which keys are seen, bool, for positions [..., s, 1] and [..., 1, k] with a dimension of heads
        before them.

        The dimension of heads in the result is 1 if all heads see the same.
        """

    def columns(self, first: int, end: int, start: int, device: torch.device) -> slice | Tensor:
        """Returns the keys that some query of first .. end - 1 sees, in order, these positions last.

        Args:
            first: First query.
            end: Query after the last one.
            start: First key to return.
            device: Device of the result.
        """


class Layout(Protocol):
    """A layout of blocks, see megatron.block_sparsity."""

    @property
    def block(self) -> int: ...

    @property
    def per_head(self) -> bool: ...

    def seen(self, row: int, head: int = 0) -> list[int]: ...


@dataclass(frozen=True)
class Window:
    """The last `width` positions, including the query's own (arXiv:2004.05150; Mistral, arXiv:2310.06825)."""

    width: int

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        return keys > queries - self.width

    def columns(self, first: int, end: int, start: int, device: torch.device) -> slice:
        return slice(max(start, first - self.width + 1), end)


class BlockPattern:
    """The blocks of a layout. heads: indices of the heads of a call in the full model."""

    def __init__(self, layout: Layout, heads: range) -> None:
        self.layout = layout
        self.heads = heads if layout.per_head else range(1)
        self._rows: list[list[list[int]]] = []  # visible columns of each row and head
        self._tables: dict[torch.device, Tensor] = {}

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        size = self.layout.block
        # a GPU is given every key from 0 on, and asking it for the last one would make the host wait
        last = int(torch.maximum(queries.max(), keys.max())) if keys.device.type == "cpu" else keys.shape[-1] - 1
        rows = last // size + 1
        table = self.table(rows, queries.device)
        heads = torch.arange(len(self.heads), device=queries.device)[:, None, None]
        return table[heads, queries // size, keys // size]

    def columns(self, first: int, end: int, start: int, device: torch.device) -> slice | Tensor:
        size = self.layout.block
        rows = self._seen((end - 1) // size + 1)
        blocks = {column for row in rows[first // size : (end - 1) // size + 1] for head in row for column in head}
        keys = [range(max(start, column * size), min(end, (column + 1) * size)) for column in sorted(blocks)]
        keys = [part for part in keys if len(part)]
        if keys[-1].stop - keys[0].start == sum(len(part) for part in keys):
            return slice(keys[0].start, keys[-1].stop)
        return torch.cat([torch.arange(part.start, part.stop, device=device) for part in keys])

    def table(self, rows: int, device: torch.device) -> Tensor:
        """Returns the layout of at least that many rows, bool [heads or 1, rows, rows]; the memory grows by
        doubling.
        """
        known = self._tables.get(device)
        if known is None or known.shape[1] < rows:
            room = 1 << (rows - 1).bit_length()
            known = torch.zeros(len(self.heads), room, room, dtype=torch.bool)
            for row, by_head in enumerate(self._seen(room)[:room]):
                for head, columns in enumerate(by_head):
                    known[head, row, columns] = True
            known = known.to(device)
            self._tables[device] = known
        return known

    def _seen(self, rows: int) -> list[list[list[int]]]:
        """Returns the visible columns of at least the first rows."""
        for row in range(len(self._rows), rows):
            self._rows.append([self.layout.seen(row, head) for head in self.heads])
        return self._rows


@dataclass(frozen=True)
class AttentionMask:
    """A pattern of hidden keys and a bias of scores."""

    pattern: MaskPattern | None = None
    """Hides keys; None hides none."""
    bias: Tensor | None = None
    """[n, distances], added to the score of a query and the key at that distance; None adds nothing."""
    slopes: Tensor | None = None
    """fp32 [n], where the bias is exactly -slope * distance, for kernels that compute it themselves."""
    sinks: Tensor | None = None
    """[n], a logit of each head that the softmax sums besides the keys, with a value of 0; None for none."""
    softcap: float | None = None
    """Bound of the scores before a bias: softcap * tanh(score / softcap), as in arXiv:2408.00118, section 2."""

    def capped(self, scores: Tensor) -> Tensor:
        """Returns the scores within the bound."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def softmax(self, scores: Tensor) -> Tensor:
        """Returns the probabilities of the keys, of masked and biased scores [b, n, s, k]."""
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Returns what is added to the scores: 0 or the bias, and -inf for hidden keys, fp32 [..., n or 1, s, k].

        queries and keys: positions [..., 1, s, 1] and [..., 1, 1, k].
        """
        seen = self.seen(queries, keys)
        if self.bias is None:
            return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))
        distance = (queries - keys).clamp_(min=0)  # [..., 1, s, k]
        heads = torch.arange(self.bias.shape[0], device=distance.device)[:, None, None]
        return self.bias[heads, distance].float().masked_fill(~seen, float("-inf"))

    def seen(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Returns which keys are seen, bool [..., n or 1, s, k]; positions as in ``scores``."""
        seen = keys <= queries
        return seen if self.pattern is None else seen & self.pattern.sees(queries, keys)


def window_for_package(starts: Tensor | None, view: AttentionMask | None) -> int | None:
    """Returns the window size that packages accept, -1 for no window.

    None if they cannot express the mask: document masks, other patterns than a window, biases, bounds of scores, sinks.
    """
    if starts is not None:
        return None
    if view is None:
        return -1
    if any(part is not None for part in (view.bias, view.softcap, view.sinks)) or not isinstance(
        view.pattern, Window | None
    ):
        return None
    return -1 if view.pattern is None else view.pattern.width - 1
