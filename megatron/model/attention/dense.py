"""Causal self-attention with heads sharded over tensor-parallel ranks (arXiv:1909.08053, section 3).

The rows of the joint QKV matrix follow the public checkpoint layout: [q, k, v] head by head if every query head has its
own key/value head, and [all q | all k | all v] if query heads share them.

Shapes: s sequence on this rank, b micro batch, h hidden, n query heads, m key/value heads, d head dim, t
tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron.distributed.param_attrs import HeadLayout, mark_heads, recorded_logits
from megatron.distributed.param_init import ParamFactory
from megatron.distributed.tensor_parallel.key_heads import gather_head
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.distributed.tensor_parallel.sequence_parallel import Regather
from megatron.kernels.attention import masked_attention
from megatron.kernels.max_logits import max_logits
from megatron.model.attention.self_attention import SelfAttention, visible_mask
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import KVCache
from megatron.model.value_residual import ValueResidual


class ParallelSelfAttention(SelfAttention):
    """Causal attention of block ``number`` (from 0).

    Raises ValueError if the heads or the key/value heads do not divide by the tensor-parallel degree.
    """

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__(number, spec, source)
        dims, size = spec.dims, source.axis.size
        self.kv_heads = max(1, dims.num_kv_heads // size)  # m/t
        self.key_head = spec.key_head
        ranks = size * self.kv_heads // dims.num_kv_heads  # r, those of a head
        if (
            dims.num_attention_heads % size
            or ranks * dims.num_kv_heads != size * self.kv_heads
            or dims.head_dim % ranks
        ):
            raise ValueError(
                f"{dims.num_attention_heads} heads and {dims.num_kv_heads} key/value heads do not divide by "
                f"{size} tensor-parallel ranks"
            )
        if ranks != self.key_head.size:
            raise ValueError(
                f"a key head is shared by {ranks} ranks, and the topology has groups of {self.key_head.size}"
            )
        ulysses = spec.shards.ulysses
        if self.kv_heads % ulysses.size:
            raise ValueError(
                f"{self.kv_heads} key/value heads of a tensor-parallel rank do not divide by "
                f"{ulysses.size} context-parallel ranks that exchange heads"
            )
        self.grouped = dims.grouped
        self.q_layernorm = spec.head_norm(dims.num_attention_heads) if spec.head_norm else None
        self.k_layernorm = spec.head_norm(dims.num_kv_heads) if spec.head_norm else None
        self.query_key_value = ColumnParallelLinear(
            dims.hidden_size,
            dims.query_size + 2 * dims.kv_size,
            source.of("query_key_value"),
            init_fn=spec.init_fn,
            bias=dims.has_qkv_bias,
            sections=(dims.query_size, dims.kv_size, dims.kv_size) if dims.grouped else (),
            kernel=spec.kernels.linear,
            lora=spec.lora_specs.get("query_key_value"),
        )
        layout = HeadLayout(dims.num_attention_heads, dims.num_kv_heads, dims.head_dim, dims.grouped)
        mark_heads(self.query_key_value.weight, layout)
        self.value_residual: Callable[[Tensor], Tensor] | None = None
        if dims.value_residual:
            self.value_residual = ValueResidual(source.of("value_residual"), records=number == 0)
        self.output_gate: ColumnParallelLinear | None = None
        if dims.output_gate:
            self.output_gate = ColumnParallelLinear(
                dims.hidden_size,
                dims.query_size,
                source.of("output_gate"),
                init_fn=spec.init_fn,
                bias=dims.has_qkv_bias,
                kernel=spec.kernels.linear,
                lora=spec.lora_specs.get("output_gate"),
            )
        self.dense = RowParallelLinear(
            dims.query_size,
            dims.hidden_size,
            source.of("dense"),
            init_fn=spec.output_init_fn,
            bias=dims.attention_bias,
            kernel=spec.kernels.linear,
            lora=spec.lora_specs.get("dense"),
        )

    def inner(
        self,
        x: Tensor,
        cache: KVCache | None,
        document_starts: Tensor | None = None,
        regather: Regather | None = None,
    ) -> Tensor:
        """[s, b, h] -> the input of ``dense`` [s, b, n/t * d]; see the base class.

        Args:
            x: input of the block's attention.
            cache: keys and values of earlier positions, or None.
            document_starts: position at which each token's document starts [b, s], or None.
            regather: of the region that the caller ends.
        """
        qkv = self.query_key_value(x, regather)
        length, batch = qkv.shape[:2]
        q, k, v = self._split(qkv)
        v = v if self.value_residual is None else self.value_residual(v)
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))  # [b, n/t, s, d]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if self.query_factor != 1.0:
            q = q * self.query_factor
        core = self._attend(q, k, v, document_starts) if cache is None else self._attend_cached(q, k, v, cache)
        core = core.permute(2, 0, 1, 3).reshape(length, batch, self.heads * self.head_dim)  # [s, b, h/t]
        return core if self.output_gate is None else core * torch.sigmoid(self.output_gate(x, regather))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, document_starts: Tensor | None) -> Tensor:
        """Attends over full sequences: q [b, n/t, s, d], k and v [b, m/t, s, d] -> [b, n/t, s, d]."""
        if self.positions is not None:
            q, k = self.positions.pair(q, k, *self.positions_of(q, document_starts))
        logits = recorded_logits(self.query_key_value.weight)
        if logits is not None and self.training and torch.is_grad_enabled():
            logits.copy_(torch.maximum(logits, max_logits(q.detach(), k.detach())))
        return self.core(q, k, v, document_starts)

    def _attend_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> Tensor:
        """Attends from new positions to the cache: shapes as in ``_attend``. The cache may have a higher precision."""
        slots, dtype = cache.slots(q.shape[2]), q.dtype
        view = self.view(slots.end, q.device)
        if view is None and cache.decode_kernel is not None and q.shape[2] == 1 and dtype == cache.memory.dtype:
            table = None if self.positions is None else self.positions.table(slots.end, q.device)
            return cache.attend_decode(self.number, q[:, :, 0], k[:, :, 0], v[:, :, 0], table).unsqueeze(2)
        if self.positions is not None:
            q, k = self.positions.pair(q, k, cache.length, slots.positions)
        k, v = cache.update(self.number, k, v)  # [b, m/t, end, d]
        if view is not None:
            shown = visible_mask(view, slots, q.shape[2], q.device)
            if view.pattern is not None and slots.positions is None:  # keys that no row sees cost nothing
                seen = view.pattern.columns(slots.end - q.shape[2], slots.end, 0, q.device)
                k, v, shown = k[:, :, seen], v[:, :, seen], shown[..., seen]
            return masked_attention(q.to(k.dtype), k, v, shown, view).to(dtype)
        if slots.mask is not None:  # rows of different lengths
            return masked_attention(q.to(k.dtype), k, v, slots.mask).to(dtype)
        return self.attend(q.to(k.dtype), k, v, 0.0, None).to(dtype)

    def linear_layers(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """Returns the layers with a sharded weight."""
        gate = [] if self.output_gate is None else [self.output_gate]
        return [self.query_key_value, *gate, self.dense]

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, (n + 2m)/t * d] -> queries [s, b, n/t, d], keys and values [s, b, m/t, d].

        They are views, but for a key head that several ranks share, which is gathered.
        """
        length, batch = qkv.shape[:2]
        if not self.grouped:
            q, k, v = qkv.view(length, batch, self.heads, 3, self.head_dim).unbind(3)
            return q, k, v
        if self.key_head.size > 1:
            size, part = self.heads * self.head_dim, self.head_dim // self.key_head.size
            q, k, v = qkv.split([size, part, part], dim=2)
            k, v = gather_head(torch.stack((k, v)), self.key_head).unsqueeze(3)  # [s, b, 1, d]
            return q.unflatten(2, (self.heads, self.head_dim)), k, v
        spec = qkv.view(length, batch, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = spec.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        return q, k, v
