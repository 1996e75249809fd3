"""Attention of an encoder-decoder besides the decoder's own: in the encoder, and from decoder to encoder.

Shapes: s queries, k encoder tokens, b micro batch, h hidden, n query heads, m key/value heads, d head dim, t
tensor-parallel degree. With sequence parallelism inputs and outputs are shards of a sequence.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from torch import Tensor, nn

from megatron.distributed.param_init import ParamFactory
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.distributed.tensor_parallel.sequence_parallel import Regather
from megatron.kernels.padded_attention import attention_to, encoder_attention
from megatron.model.attention.dense import ParallelSelfAttention
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import KVCache
from megatron.model.real_tokens import RealTokens
from megatron.model.scales import scaled
from megatron.model.source_cache import SourceCache


class EncoderAttention(ParallelSelfAttention):
    """Self-attention of an encoder's block: every token sees all tokens that are not padding."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__(number, spec, source)
        recompute = spec.kernels.recompute
        self.attend_padded = encoder_attention if recompute is None else partial(recompute, encoder_attention)

    def inner(
        self,
        x: Tensor,
        cache: KVCache | None,
        document_starts: Tensor | None = None,
        regather: Regather | None = None,
    ) -> Tensor:
        """Returns the input of ``dense``, [s, b, n/t * d], or [r, 1, n/t * d] where `x` is packed.

        Args:
            x: input of the block's attention [s, b, h]; without its padding [r, 1, h] where `RealTokens` leaves it out.
            cache: not used: the encoder runs once.
            document_starts: 0 where a token is not padding [b, s], or None without padding.
            regather: of the region that the caller ends.
        """
        real = RealTokens.of(None if document_starts is None else document_starts == 0, self.dense.axis)
        qkv = self.query_key_value(x, regather)
        q, k, v = (part.permute(1, 2, 0, 3) for part in self._split(qkv if real is None else real.unpack(qkv)))
        q = scaled(q, self.query_factor)
        core = self._attend(q, k, v, document_starts).permute(2, 0, 1, 3).flatten(2)  # [s, b, h/t]
        return core if real is None else real.pack(core)

    def core(self, q: Tensor, k: Tensor, v: Tensor, document_starts: Tensor | None) -> Tensor:
        """Attends over full sequences -> [b, n/t, s, d].

        Args:
            q: queries with positions [b, n/t, s, d].
            k: keys with positions [b, m/t, s, d].
            v: values [b, m/t, s, d].
            document_starts: 0 where a token is not padding [b, s], or None without padding.
        """
        bias = None if self.rpe is None else self.rpe(q.shape[2], q.device, encodes=True)
        with self.draws():
            return self.attend_padded(q, k, v, self.dropout if self.training else 0.0, document_starts, bias)


class CrossAttention(nn.Module):
    """Attention of decoder block ``number`` (from 0, among all blocks) to the output of the encoder.

    The rows of the joint matrix of keys and values are those of each head, [k, v].
    """

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        dims, size = spec.dims, source.axis.size
        self.number, self.head_dim = number, dims.head_dim
        self.heads, self.kv_heads = dims.num_attention_heads // size, dims.num_kv_heads // size
        self.query_factor = spec.scales.query
        self.dropout = spec.attention_dropout
        self.draws = spec.random.fork if size > 1 and self.dropout > 0 else nullcontext
        recompute = spec.kernels.recompute
        self.core = attention_to if recompute is None else partial(recompute, attention_to)
        columns = partial(
            ColumnParallelLinear,
            dims.hidden_size,
            init_fn=spec.init_fn,
            bias=dims.has_qkv_bias,
            kernel=spec.kernels.linear,
        )
        self.query = columns(dims.query_size, source.of("query"))
        self.key_value = columns(2 * dims.kv_size, source.of("key_value"))
        self.dense = RowParallelLinear(
            dims.query_size,
            dims.hidden_size,
            source.of("dense"),
            init_fn=spec.output_init_fn,
            bias=dims.attention_bias,
            kernel=spec.kernels.linear,
        )

    def forward(
        self, x: Tensor, encoded: Tensor | None, shown: Tensor | None = None, cache: SourceCache | None = None
    ) -> Tensor:
        """Returns [s, b, h].

        Args:
            x: Input of the queries [s, b, h].
            encoded: Output of the encoder [k, b, h]; None where the cache has its keys and values.
            shown: Tokens of the encoder that are not padding, bool [b, k]; None without padding.
            cache: Keys and values of earlier steps.
        """
        q = self.query(x).unflatten(2, (self.heads, self.head_dim)).permute(1, 2, 0, 3)  # [b, n/t, s, d]
        q = scaled(q, self.query_factor)
        if cache is None:
            assert encoded is not None
            k, v = self.keys_and_values(encoded, shown)
        else:
            (k, v), shown = cache.encoded(self.number), cache.shown
        with self.draws():
            core = self.core(q.to(k.dtype), k, v, self.dropout if self.training else 0.0, shown).to(x.dtype)
        return self.dense(core.permute(2, 0, 1, 3).flatten(2))

    def keys_and_values(self, encoded: Tensor, shown: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output of the encoder [k, b, h] -> keys and values [b, m/t, k, d]. shown: tokens without padding [b, k]."""
        real = RealTokens.of(shown, self.dense.axis)
        joined = self.key_value(encoded) if real is None else real.unpack(self.key_value(real.pack(encoded)))
        both = joined.unflatten(2, (self.kv_heads, 2, self.head_dim))
        k, v = both.permute(3, 1, 2, 0, 4).unbind()  # [b, m/t, k, d]
        return k, v
