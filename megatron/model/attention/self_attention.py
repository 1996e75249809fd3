"""What every kind of self-attention shares: heads on ranks, the core over full sequences, the projection of its output.

Besides the causal mask a block may hide keys (a sliding window, blocks of a sparse layout) and positions may be added
to the scores; both are an AttentionMask of the kernels.

Context parallelism: each of c ranks has a shard of the sequence outside the attention core. An all-to-all before the
core exchanges the shards of u ranks for heads, and another one after it exchanges them back (arXiv:2309.14509). With a
ring the core is that of `distributed/context_parallel/ring.py`, over the c/u members that then share the sequence.

Shapes: s sequence on this rank, b micro batch, h hidden, n query heads, m key/value heads, d head dim, t
tensor-parallel, c context-parallel and u Ulysses degree.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from megatron.distributed.context_parallel.ring import ring_attention
from megatron.distributed.context_parallel.ulysses import all_to_all_heads_to_seq, all_to_all_seq_to_heads
from megatron.distributed.param_init import ParamFactory, zeros
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.distributed.tensor_parallel.sequence_parallel import Regather
from megatron.kernels.attention import AttentionKernel
from megatron.kernels.attention_patterns import AttentionMask
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import CacheSlots, KVCache
from megatron.model.positions.base import document_positions
from megatron.registry import LEARNABLE, OFF_BY_ONE


class SelfAttention(nn.Module):
    """Base class of the attention of block ``number`` (from 0)."""

    dense: RowParallelLinear
    """Projection of the output, which a subclass builds."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        dims, size = spec.dims, source.axis.size
        ulysses = spec.shards.ulysses
        self.number = number
        self.heads = dims.num_attention_heads // size  # n/t
        self.head_dim = dims.head_dim
        self.positions = spec.positions[number]
        self.reset_attention, self.reset_positions = spec.reset_attention, spec.reset_positions
        self.attend: AttentionKernel = spec.kernels.attention[dims.kind(number)]
        self.dropout = spec.attention_dropout
        self.shards = spec.shards
        recompute = spec.kernels.recompute
        self.ring = ring_attention if recompute is None else partial(recompute, ring_attention)
        self.draws = spec.random.fork if size > 1 and self.dropout > 0 else nullcontext
        shared = range(self.heads // ulysses.size)  # n/(t u): the heads that one core sees
        self.core_heads = slice(ulysses.rank * len(shared), (ulysses.rank + 1) * len(shared))
        first = source.axis.rank * self.heads + self.core_heads.start
        self.pattern = spec.patterns[number](range(first, first + len(shared)))
        self.rpe = spec.relative_positions
        self.query_factor = spec.multipliers.query * spec.scales.query
        self.softcap = spec.scales.attention_bound
        self.off_by_one = dims.softmax_type == OFF_BY_ONE
        self.sinks: nn.Parameter | None = None
        if dims.softmax_type == LEARNABLE:
            self.sinks = source.sharded("sinks", (dims.num_attention_heads,), zeros, dim=0)

    def inner(
        self,
        x: Tensor,
        cache: KVCache | None,
        document_starts: Tensor | None = None,
        regather: Regather | None = None,
    ) -> Tensor:
        """[s, b, h] -> the input of ``dense`` [s, b, n/t * width of a value head].

        Args:
            x: input of the block's attention.
            cache: keys and values of earlier positions, or None.
            document_starts: position at which each token's document starts [b, s], or None.
            regather: of the region that the caller ends.
        """
        raise NotImplementedError

    def linear_layers(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """Returns the layers with a sharded weight."""
        raise NotImplementedError

    def forward(self, x: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """[s, b, h] -> [s, b, h], equal on all ranks."""
        regather = Regather.of(self.dense.axis)
        return self.dense(self.inner(x, cache, document_starts, regather), regather)

    def core(self, q: Tensor, k: Tensor, v: Tensor, document_starts: Tensor | None) -> Tensor:
        """Attends over full sequences -> [b, n/t, s, d].

        Args:
            q: queries with positions [b, n/t, s, d].
            k: keys with positions [b, m/t, s, d].
            v: values [b, m/t, s, d].
            document_starts: position at which each token's document starts [b, s], or None.
        """
        shards = self.shards
        starts = document_starts if self.reset_attention else None
        q, k, v = (all_to_all_seq_to_heads(part, shards.ulysses) for part in (q, k, v))  # [b, n/(t u), u s, d]
        view = self.view(q.shape[2] * shards.ring.size, q.device)
        if shards.ring.size > 1:
            core = self.ring(q, k, v, shards, starts, view)
        else:
            with self.draws():
                core = self.attend(q, k, v, self.dropout if self.training else 0.0, starts, view)
        return all_to_all_heads_to_seq(core, shards.ulysses)  # [b, n/t, s, d]

    def positions_of(self, q: Tensor, document_starts: Tensor | None) -> tuple[int, Tensor | None]:
        """Returns the first position of this rank's queries [b, n/t, s, d], and the positions [b, s] if they do not
        follow each other from there; none of them is above the first one by s or more.
        """
        shards, batch, length = self.shards, q.shape[0], q.shape[2]
        at = document_positions(document_starts) if self.reset_positions else None
        if at is not None:
            at = shards.shard(at)
        elif not shards.in_order:
            at = shards.positions(length, q.device).expand(batch, -1)
        return (shards.first(length) if shards.in_order else (shards.context.size - 1) * length), at

    def view(self, length: int, device: torch.device) -> AttentionMask | None:
        """Returns the mask and biases for a sequence of that length, or None."""
        sinks = self._sinks(device)
        if self.pattern is None and self.rpe is None and self.softcap is None and sinks is None:
            return None
        if self.rpe is None:
            return AttentionMask(self.pattern, softcap=self.softcap, sinks=sinks)
        slopes_on: Callable[[torch.device], Tensor] | None = getattr(self.rpe, "slopes_on", None)
        slopes = None if slopes_on is None else slopes_on(device)[self.core_heads]
        bias = self.rpe(length, device)[self.core_heads]
        return AttentionMask(self.pattern, bias, slopes, softcap=self.softcap, sinks=sinks)

    def _sinks(self, device: torch.device) -> Tensor | None:
        """Returns the logits that the softmax of each head of a core sums besides the keys, or None."""
        if self.off_by_one:
            return torch.zeros(self.core_heads.stop - self.core_heads.start, device=device)
        return None if self.sinks is None else self.sinks[self.core_heads]


def visible_mask(view: AttentionMask, slots: CacheSlots, length: int, device: torch.device) -> Tensor:
    """Returns the mask of cached rows for ``masked_attention``: [b or 1, n or 1, s, end].

    Args:
        view: hides keys and adds biases.
        slots: of the new positions.
        length: number of new positions, s.
        device: device of the result.
    """
    keys = torch.arange(slots.end, device=device)
    queries = keys[None, slots.end - length :] if slots.positions is None else slots.positions  # [b or 1, s]
    queries, keys = queries[:, None, :, None], keys[None, None, None]
    return view.seen(queries, keys) if view.bias is None else view.scores(queries, keys)
