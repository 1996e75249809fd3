"""Masked language model objective: cross entropy of masked tokens, and of the order of two segments.

Shapes: s sequence, b micro batch.
"""

from __future__ import annotations

from torch import Tensor

from megatron.model.masked_head import MaskedTargets


class MaskedLanguageModel:
    """Cross entropy of the masked tokens [nats per masked token] and of the order of segments [nats per sample]."""

    in_output_layer = True
    """The output layer always computes the loss, since it has two heads."""

    def targets(
        self,
        labels: Tensor,
        loss_mask: Tensor,
        *,
        tokens: Tensor,
        vocabulary: int | None = None,
        order: Tensor | None = None,
    ) -> MaskedTargets:
        """Returns what the heads need to compute the loss.

        Args:
            labels: ids of the masked tokens [b, s], 0 elsewhere.
            loss_mask: 1 where a token is to be predicted [b, s].
            tokens: the engine's divisor, one for all micro batches of a step (engine/loss_normalization.py).
            vocabulary: number of tokens; logits past them get no probability.
            order: 1 where the segments of a sample are swapped [b, 1].
        """
        return MaskedTargets(labels.t(), loss_mask.t().float() / tokens, vocabulary, order=order)
