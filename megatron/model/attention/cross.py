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
from megatron.kernels.padded_attention import attention_to, encoder_attention
from megatron.model.attention.dense import ParallelSelfAttention
from megatron.model.block_spec import BlockSpec
from megatron.model.source_cache import SourceCache


class EncoderAttention(ParallelSelfAttention):
    """Self-attention of an encoder's block: every token sees all tokens that are not padding."""

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__(number, spec, source)
        recompute = spec.kernels.recompute
        self.attend_padded = encoder_attention if recompute is None else partial(recompute, encoder_attention)

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
        if self.query_factor != 1.0:
            q = q * self.query_factor
        if cache is None:
            assert encoded is not None
            k, v = self.keys_and_values(encoded)
        else:
            (k, v), shown = cache.encoded(self.number), cache.shown
        with self.draws():
            core = self.core(q.to(k.dtype), k, v, self.dropout if self.training else 0.0, shown).to(x.dtype)
        return self.dense(core.permute(2, 0, 1, 3).flatten(2))

    def keys_and_values(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the encoder [k, b, h] -> keys and values [b, m/t, k, d]."""
        both = self.key_value(encoded).unflatten(2, (self.kv_heads, 2, self.head_dim))
        k, v = both.permute(3, 1, 2, 0, 4).unbind()  # [b, m/t, k, d]
        return k, v
