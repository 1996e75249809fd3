"""Word embedding with a sharded vocabulary; if tied, it is the output layer too.

Shapes: b micro batch, s sequence, h hidden, v padded vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.collectives import copy_to
from megatron.distributed.param_attrs import mark_embedding_like
from megatron.distributed.param_init import InitFn, ParamFactory
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets, bounded, linear_cross_entropy
from megatron.distributed.tensor_parallel.sequence_parallel import (
    gather_or_copy_to_tp,
    gathered_linear,
    reduce_from_tp,
)
from megatron.kernels.cross_entropy import SoftmaxPass, softmax_pass
from megatron.kernels.linear import LinearKernel, plain_linear


class VocabParallelEmbedding(nn.Module):
    """Word embedding with parameter ``weight`` [v/t, h]: rank r holds tokens r*v/t up to (r+1)*v/t.

    Args:
        vocab_size: Rows of the global weight, padding included.
        hidden_size: Columns of the weight.
        source: Creates the parameter.
        init_fn: Initial values.
        kernel: Computes the logits of a tied output layer.
        softmax: Softmax over the vocabulary in the loss of a tied output layer.
        bound: Bound of the logits of a tied output layer, or None.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        source: ParamFactory,
        *,
        init_fn: InitFn,
        kernel: LinearKernel = plain_linear,
        softmax: SoftmaxPass = softmax_pass,
        bound: float | None = None,
    ) -> None:
        super().__init__()
        self.axis = source.axis
        self.kernel, self.softmax, self.bound = kernel, softmax, bound
        self.weight = source.sharded("weight", (vocab_size, hidden_size), init_fn, dim=0)
        mark_embedding_like(self.weight)
        self.first = self.axis.rank * (vocab_size // self.axis.size)  # [tokens]

    def forward(self, x: Tensor, *, as_output_layer: bool = False, targets: TokenTargets | None = None) -> Tensor:
        """Token ids of any shape [...] -> vectors [..., h]; as the output layer [..., h] -> logits [..., v/t].

        With sequence parallelism the vectors are those of this rank's shard of the first dimension, [s/t, ..., h]. All
        uses go through forward, so that ZeRO 3 gathers the weight before either. With targets it is the output layer
        and returns their loss instead, an fp32 scalar.
        """
        if targets is not None:
            hidden = gather_or_copy_to_tp(x, self.axis)
            return linear_cross_entropy(hidden, self.weight, targets, self.axis, self.kernel, self.softmax, self.bound)
        if as_output_layer:
            if self.axis.sequence_parallel:
                logits = gathered_linear(x, self.weight, None, self.axis, self.kernel)  # [s, .., v/t]
            else:
                logits = self.kernel(copy_to(x, self.axis), self.weight, None)  # [..., v/t]
            return bounded(logits, self.bound)
        if self.axis.size == 1:
            return F.embedding(x, self.weight)  # [..., h]
        local = x - self.first
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        vectors = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        vectors = vectors.masked_fill(elsewhere.unsqueeze(-1), 0)
        return reduce_from_tp(vectors, self.axis)  # [..., h]
