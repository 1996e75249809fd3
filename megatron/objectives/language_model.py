"""Language model objective: mean cross entropy of the next token.

Shapes: s sequence, b micro batch, v padded vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from torch import Tensor

from megatron.distributed.mesh import Axis
from megatron.distributed.tensor_parallel.cross_entropy import weighted_cross_entropy
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets


class LanguageModel:
    """Next-token cross entropy [nats per token]."""

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        axis: Axis,
        *,
        tokens: Tensor,
        vocabulary: int | None = None,
    ) -> Tensor:
        """Returns the sum over the micro batch's unmasked tokens, divided by `tokens`: an fp32 scalar.

        If a gradient is needed, the logits are overwritten with it.

        Args:
            logits: [s, b, v/t].
            labels: token ids [b, s].
            loss_mask: 1 where the token counts [b, s].
            axis: tensor-parallel ranks, which all get the same loss.
            tokens: the engine's divisor, one for all micro batches of a step (engine/loss_normalization.py).
            vocabulary: number of tokens; logits past them get no probability.
        """
        return weighted_cross_entropy(logits, labels.t(), loss_mask.t().float() / tokens, axis, vocabulary)

    def targets(
        self, labels: Tensor, loss_mask: Tensor, *, tokens: Tensor, vocabulary: int | None = None
    ) -> TokenTargets:
        """Returns what the output layer needs to compute this loss itself, block by block.

        Args:
            labels: token ids [b, s].
            loss_mask: 1 where the token counts [b, s].
            tokens: the engine's divisor.
            vocabulary: number of tokens; logits past them get no probability.
        """
        return TokenTargets(labels.t(), loss_mask.t().float() / tokens, vocabulary)
