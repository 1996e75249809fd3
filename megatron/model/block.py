"""One transformer block: attention and MLP around the residual stream.

- sequential residual: x = x + attention(norm(x)); x = x + mlp(norm(x))
- parallel residual (`gpt_j_residual`, GPT-J): x = x + attention(norm1(x)) + mlp(norm2(x)); `gpt_j_tied` uses one norm
- the norms before attention and MLP (`pre`), on what they give (`output`: x = x + norm(attention(x))), both
  (`sandwich`), or on the residual after each addition (`post`: x = norm(x + attention(x)))
- dropout on both terms, and a factor (`residual_multiplier`)
- sequence parallelism, KV cache, document masks
- optionally Transformer Engine's fused norm and MLP, and FP8 autocast

Shapes: s sequence, b micro batch, h hidden. With sequence parallelism the residual stream is [s/t, b, h].
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from megatron.distributed.mesh import Axis
from megatron.distributed.param_init import ParamFactory
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.distributed.tensor_parallel.sequence_parallel import Regather, reduce_from_tp
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import KVCache
from megatron.model.mlp.dense import ParallelMLP
from megatron.model.scales import scaled


class Block(nn.Module):
    """Base class of the layers between the embedding and the final norm: [s, b, h] -> [s, b, h].

    zero3_gather_together: true if submodules read each other's parameters, so that ZeRO 3 must gather them together.
    attends: true if it has attention.
    """

    zero3_gather_together = False
    attends = False

    def __init__(self, spec: BlockSpec, axis: Axis) -> None:
        """Sets up dropout. axis: tensor-parallel ranks, over which the sequence may be sharded."""
        super().__init__()
        self.dropout, self.dropout_add = spec.hidden_dropout, spec.kernels.dropout_add
        self.residual_multiplier = spec.scales.residual
        self.draws = spec.random.fork if axis.sequence_parallel and self.dropout > 0 else nullcontext

    def add(self, hidden: Tensor, x: Tensor) -> Tensor:
        """Adds a term to the residual stream, with its factor and dropout."""
        x = scaled(x, self.residual_multiplier)
        if self.dropout == 0 or not self.training:
            return hidden + x
        with self.draws():
            return self.dropout_add(x, hidden, self.dropout)

    def linear_layers(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """Returns the linear layers of attention and of a dense MLP."""
        return []


class TransformerBlock(Block):
    """Attention and MLP. Block ``number`` (from 0) is layer number + 2 of the model.

    fused_norm_mlp: computes norm and MLP in one layer, if set. autocast: context of the forward pass in training.
    """

    attends = True
    fused_norm_mlp: Callable[[Tensor], Tensor] | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(self, number: int, spec: BlockSpec, source: ParamFactory) -> None:
        super().__init__(spec, source.axis)
        dims = spec.dims
        self.axis = source.axis
        self.parallel = dims.gpt_j_residual
        self.input_layernorm = spec.norm() if dims.norms_before else None
        self.attention: Any = spec.attention[number](number, spec, source.of("attention"))
        self.zero3_gather_together = dims.latent is not None or getattr(  # a cache reads the weight of a projection
            self.attention, "zero3_gather_together", False
        )
        self.attention_output_layernorm = spec.norm() if dims.norms_after else None
        if not dims.shared_norm:
            self.post_attention_layernorm = spec.norm() if dims.norms_before else None
        self.takes_residual = (
            not dims.shared_norm
            and self.residual_multiplier == 1.0
            and getattr(self.post_attention_layernorm, "takes_residual", False)
        )
        self.mlp_output_layernorm = spec.norm() if dims.norms_after else None
        self.shared_norm, self.norms_sums = dims.shared_norm, dims.norms_sums
        self.mlp: Any = spec.mlp[number](spec, source.of("mlp"))
        self.takes_padding: bool = getattr(self.mlp, "takes_padding", False)
        self.to(spec.dtype)

    def forward(
        self,
        hidden: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """[s, b, h] -> [s, b, h].

        Args:
            hidden: Residual stream.
            cache: Keys and values of earlier tokens, or None.
            document_starts: Start of the document of each token [b, s].
            padding: True for a token that the packing added [b, s]; read by experts alone (`takes_padding`).
        """
        run = self._parallel if self.parallel else self._sequential
        more = (padding,) if self.takes_padding and padding is not None else ()
        with self.autocast() if self.training else nullcontext():
            return run(hidden, cache, document_starts, *more)

    def input_shape(self, hidden: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns the shape of its input. hidden: that of the residual stream, [s, b, h]."""
        return hidden

    def linear_layers(self) -> list[ColumnParallelLinear | RowParallelLinear]:
        """Returns the linear layers of attention and of a dense MLP."""
        found: list[ColumnParallelLinear | RowParallelLinear] = self.attention.linear_layers()
        return found + ([self.mlp.linear1, self.mlp.linear2] if isinstance(self.mlp, ParallelMLP) else [])

    def _sequential(self, hidden: Tensor, cache: KVCache | None, starts: Tensor | None, *of_mlp: Tensor) -> Tensor:
        attended = self.attention(_normed(self.input_layernorm, hidden), cache, starts)
        if self.norms_sums:
            hidden = _normed(self.attention_output_layernorm, self.add(hidden, attended))
            return _normed(self.mlp_output_layernorm, self.add(hidden, self.mlp(hidden, *of_mlp)))
        attended = _normed(self.attention_output_layernorm, attended)
        if self.fused_norm_mlp is not None:
            hidden = self.add(hidden, attended)
            return self.add(hidden, self.fused_norm_mlp(hidden))
        norm: Any = self.post_attention_layernorm
        if self.takes_residual and (self.dropout == 0 or not self.training):
            normed, hidden = norm(attended, hidden)
        else:
            hidden = self.add(hidden, attended)
            normed = _normed(norm, hidden)
        return self.add(hidden, _normed(self.mlp_output_layernorm, self.mlp(normed, *of_mlp)))

    def _parallel(self, hidden: Tensor, cache: KVCache | None, starts: Tensor | None, *of_mlp: Tensor) -> Tensor:
        first = _normed(self.input_layernorm, hidden)
        if self.fused_norm_mlp is not None:
            return self.add(self.add(hidden, self.attention(first, cache, starts)), self.fused_norm_mlp(hidden))
        second = first if self.shared_norm else _normed(self.post_attention_layernorm, hidden)
        if self.dropout > 0:  # the two terms have separate dropout masks, so each must be reduced
            return self.add(self.add(hidden, self.attention(first, cache, starts)), self.mlp(second, *of_mlp))
        regather = Regather.of(self.axis)
        attended = self.attention.dense.partial(self.attention.inner(first, cache, starts, regather))
        dense = isinstance(self.mlp, ParallelMLP)
        total = attended + (self.mlp.partial(second, regather) if dense else self.mlp.partial(second, *of_mlp))
        total = self.attention.dense.add_bias(reduce_from_tp(total, self.axis, regather))  # one exchange for both
        return hidden + scaled(self.mlp.add_bias(total), self.residual_multiplier)


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """Returns the norm of x, or x itself without one."""
    out: Tensor = x if norm is None else norm(x)
    return out
