"""The language model objective: the mean cross entropy of the next token.

Shapes: s sequence, b micro batch, v padded vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from torch import Tensor

from megatron.distributed.mesh import Axis
from megatron.distributed.tensor_parallel.cross_entropy import weighted_cross_entropy


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
        """The sum over the micro batch's unmasked tokens, divided by `tokens`: an fp32 scalar.

        logits [s, b, v/t], labels [b, s] token ids, loss_mask [b, s] with 1 where the token counts. axis: the
        tensor-parallel axis; all of its ranks get the same loss. Where a gradient is needed the logits are
        overwritten with it. tokens: the engine's count, one for all micro batches of a step
        (engine/loss_normalization.py). vocabulary: the ids that exist [tokens]; logits past them have no probability.
        """
        return weighted_cross_entropy(logits, labels.t(), loss_mask.t().float() / tokens, axis, vocabulary)
