"""Layer L+4 of a masked language model, the heads of BERT (arXiv:1810.04805; arXiv:1909.08053, section 5.4).

- masked tokens: a dense layer, gelu and a norm, then the word embedding's matrix and a bias of the vocabulary
- order of two segments: a dense layer and tanh on the first token (the pooler), then two logits

Only tokens that are to be predicted need logits, so on a CPU the others are left out before the dense layer.

Shapes: s sequence, b micro batch, h hidden, v padded vocabulary, t tensor-parallel degree, r tokens with a loss. With
sequence parallelism the input is this rank's shard, [s/t, b, h].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.collectives import reduce_from
from megatron.distributed.param_init import ParamFactory, zeros
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.model.block_spec import BlockSpec
from megatron.model.embedding import EmbeddingLayer
from megatron.model.head import rows_with_loss
from megatron.model.kv_cache import KVCache
from megatron.model.loss_parts import ORDER
from megatron.model.model_spec import ModelSpec


@dataclass(frozen=True)
class MaskedTargets(TokenTargets):
    """Targets of both heads."""

    order: Tensor | None = None
    """1 where the segments of a sample are swapped, int64 [b, 1]; None without that head."""


class ReplicatedLinear(nn.Module):
    """A linear layer that every tensor-parallel rank holds in full."""

    def __init__(self, inp: int, out: int, source: ParamFactory, blocks: BlockSpec) -> None:
        """Creates the parameters.

        Args:
            inp: input features.
            out: output features.
            source: creates the parameters.
            blocks: spec of the blocks; its initial values and matrix product apply here too.
        """
        super().__init__()
        self.kernel = blocks.kernels.linear
        self.weight = source.replicated("weight", (out, inp), blocks.init_fn)
        self.bias = source.replicated("bias", (out,), zeros)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.kernel(x, self.weight, self.bias)


class MaskedTransform(nn.Module):
    """What is before the output matrix: [..., h] -> [..., h]."""

    def __init__(self, hidden: int, blocks: BlockSpec, source: ParamFactory) -> None:
        super().__init__()
        self.dense = ReplicatedLinear(hidden, hidden, source.of("dense"), blocks)
        self.layernorm = blocks.norm()

    def forward(self, hidden: Tensor) -> Tensor:
        """Dense layer, gelu, norm."""
        normed: Tensor = self.layernorm(F.gelu(self.dense(hidden)))
        return normed


class MaskedHead(nn.Module):
    """Both heads. Their output layer is the word embedding's matrix, which is not a parameter of this module."""

    def __init__(
        self,
        spec: ModelSpec,
        blocks: BlockSpec,
        embedding: EmbeddingLayer | None = None,
        output: Callable[..., Tensor] | None = None,
    ) -> None:
        """Builds the heads with their initial values.

        Args:
            spec: spec of the model.
            blocks: spec of the blocks; its norm and initial values apply here too.
            embedding: layer whose matrix is the output layer's.
            output: computes the output layer, output(hidden, targets=targets), instead of an embedding.
        """
        super().__init__()
        dims, source = spec.dims, spec.param_factory(spec.dims.num_layers + 4)
        self._output = output if embedding is None else embedding.output
        self.axis, self.parts = source.axis, spec.loss_parts
        self.lm_head = MaskedTransform(dims.hidden_size, blocks, source.of("lm_head"))
        self.bias = source.sharded("bias", (spec.padded_vocab_size,), zeros, dim=0)  # [v/t]
        self.pooler: ReplicatedLinear | None = None
        self.binary_head: ReplicatedLinear | None = None
        if dims.binary_head:
            self.pooler = ReplicatedLinear(dims.hidden_size, dims.hidden_size, source.of("pooler"), blocks)
            self.binary_head = ReplicatedLinear(dims.hidden_size, 2, source.of("binary_head"), blocks)
        self.to(spec.dtype)

    def forward(
        self,
        hidden: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        targets: TokenTargets | None = None,
    ) -> Tensor:
        """Output of the final norm [s, b, h] -> logits [s, b, v/t], or the loss of the targets, an fp32 scalar.

        Args:
            hidden: Output of the final norm [s, b, h].
            cache: Not used; layers have one signature.
            document_starts: Not used; layers have one signature.
            targets: `MaskedTargets`; the loss is computed instead of logits.
        """
        assert self._output is not None
        if targets is None:
            return self._output(self.lm_head(hidden)) + self.bias
        assert isinstance(targets, MaskedTargets)
        order = self.order_logits(hidden)
        hidden, chosen = rows_with_loss(hidden, targets, self.axis)
        assert isinstance(chosen, MaskedTargets)
        return self.loss((self.lm_head(hidden), self.bias, *([] if order is None else [order])), chosen)

    def features(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Returns what `loss` reads, for an engine that must see every parameter's use before the loss.

        hidden: output of the final norm [s, b, h].
        """
        order = self.order_logits(hidden)
        return (self.lm_head(hidden), self.bias.view_as(self.bias), *([] if order is None else [order]))

    def order_logits(self, hidden: Tensor) -> Tensor | None:
        """Returns the logits of the order of the segments [b, 2], or None without that head.

        With sequence parallelism those of the first rank count, which has the first token.
        """
        if self.pooler is None or self.binary_head is None:
            return None
        pooled = torch.tanh(self.pooler(hidden[0]))  # [b, h]
        logits: Tensor = self.binary_head(pooled)
        return logits

    def loss(self, features: Sequence[Tensor], targets: MaskedTargets) -> Tensor:
        """Returns the weighted sum of the losses of tokens, and in training with it the mean loss of the order.

        features: input of the output matrix [s, b, h], bias of the vocabulary [v/t], logits of the order [b, 2].
        """
        assert self._output is not None
        hidden, bias, *order = features
        total = self._output(hidden, targets=replace(targets, bias=bias))
        if not order or targets.order is None:
            return total
        of_order = F.cross_entropy(order[0].float(), targets.order.flatten())
        if self.axis.sequence_parallel:
            of_order = reduce_from(of_order if self.axis.rank == 0 else of_order * 0.0, self.axis)
        if self.parts is not None:
            self.parts.note(ORDER, of_order)
        return total + of_order if self.training else total
