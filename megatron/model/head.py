"""The layers after the blocks: final norm and output layer, and the identity layers of the public numbering.

Shapes: s sequence, b micro batch, h hidden, v padded vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron.distributed.mesh import Axis
from megatron.distributed.param_attrs import mark_embedding_like
from megatron.distributed.param_init import PaddedInit
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets, bounded, linear_cross_entropy
from megatron.distributed.tensor_parallel.sequence_parallel import gather_or_copy_to_tp
from megatron.kernels.cross_entropy import SoftmaxPass, softmax_pass
from megatron.model.block_spec import BlockSpec
from megatron.model.embedding import EmbeddingLayer
from megatron.model.kv_cache import KVCache
from megatron.model.model_spec import ModelSpec


def rows_with_loss(hidden: Tensor, targets: TokenTargets, axis: Axis) -> tuple[Tensor, TokenTargets]:
    """Leaves out tokens without a loss on a CPU: [s, b, h] -> [r, 1, h], and their targets. Elsewhere all tokens stay.

    Args:
        hidden: Input of the layers whose output is the logits.
        targets: Labels and weights of the tokens.
        axis: Tensor-parallel ranks, which may have shards of the sequence.
    """
    if hidden.device.type != "cpu" or axis.sequence_parallel:
        return hidden, targets
    rows = targets.weights.flatten().nonzero().flatten()
    labels, weights = (x.flatten()[rows].unsqueeze(1) for x in (targets.labels, targets.weights))
    return hidden.flatten(0, 1)[rows].unsqueeze(1), replace(targets, labels=labels, weights=weights)


class Identity(nn.Module):
    """Layers 1 and L+2 of the public layout: no parameters, returns its input."""

    def forward(self, hidden: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """[s, b, h] -> the same."""
        return hidden


class FinalNorm(nn.Module):
    """Layer L+3: the norm before the output layer, if there is one."""

    def __init__(self, norm: Callable[[], nn.Module] | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = None if norm is None else norm()
        self.to(dtype)

    def forward(self, hidden: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """[s, b, h] -> [s, b, h]."""
        return hidden if self.norm is None else self.norm(hidden)


class OutputLinear(ColumnParallelLinear):
    """The output layer's matrix. Both uses go through forward, so that ZeRO 3 gathers the weight before either."""

    softmax: SoftmaxPass = staticmethod(softmax_pass)
    bound: float | None = None

    def forward(self, x: Tensor, targets: TokenTargets | None = None) -> Tensor:  # type: ignore[override]  # no region
        """[s, b, h] -> logits [s, b, v/t], or the loss of the targets, an fp32 scalar."""
        if targets is None:
            return bounded(super().forward(x), self.bound)
        hidden = gather_or_copy_to_tp(x, self.axis)
        return linear_cross_entropy(hidden, self.weight, targets, self.axis, self.kernel, self.softmax, self.bound)


class Head(nn.Module):
    """Layer L+4 with a matrix of its own, ``final_linear.weight`` [v/t, h]."""

    def __init__(self, spec: ModelSpec, blocks: BlockSpec) -> None:
        super().__init__()
        self.multiplier = spec.multipliers.output * spec.scales.logits
        self.final_linear = OutputLinear(
            spec.dims.hidden_size,
            spec.padded_vocab_size,
            spec.param_factory(spec.dims.num_layers + 4).of("final_linear"),
            init_fn=PaddedInit(blocks.init_fn, spec.vocab_size or spec.padded_vocab_size),
            bias=False,
            kernel=spec.kernels.linear,
        )
        self.final_linear.softmax = spec.kernels.cross_entropy
        self.final_linear.bound = spec.scales.logit_bound
        mark_embedding_like(self.final_linear.weight)

    @property
    def output_weight(self) -> Tensor:
        """The matrix [v/t, h]."""
        return self.final_linear.weight

    def forward(
        self,
        hidden: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        targets: TokenTargets | None = None,
    ) -> Tensor:
        """[s, b, h] -> logits [s, b, v/t], or the loss of the targets, an fp32 scalar.

        Args:
            hidden: Output of the final norm [s, b, h].
            cache: Not used; layers have one signature.
            document_starts: Not used; layers have one signature.
            targets: Labels and weights of the tokens; the loss is computed instead of logits.
        """
        return self.final_linear(hidden if self.multiplier == 1.0 else hidden * self.multiplier, targets)


class TiedHead(nn.Module):
    """Layer L+4 that shares the word embedding's matrix and has no parameter."""

    def __init__(self, embedding: EmbeddingLayer) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that the parameter is registered in layer 0 only

    def forward(
        self,
        hidden: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        targets: TokenTargets | None = None,
    ) -> Tensor:
        """[s, b, h] -> logits [s, b, v/t], or the loss of the targets; see Head.

        Args:
            hidden: Output of the final norm [s, b, h].
            cache: Not used; layers have one signature.
            document_starts: Not used; layers have one signature.
            targets: Labels and weights of the tokens.
        """
        return self._embedding[0].output(hidden, targets)
