"""Classification objective: cross entropy of the class of a text, or of the right answer of a question.

Shapes: b samples, c answers of a question (1 for classes), k classes, s sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.distributed.mesh import Axis


class ClassScores:
    """Logits of an evaluation, in the order of this rank's micro batches."""

    def __init__(self) -> None:
        self._logits: list[Tensor] | None = None

    def start(self) -> None:
        """Records from here on, anew."""
        self._logits = []

    def add(self, logits: Tensor) -> None:
        """Takes the logits of a micro batch [b, c or k], if they are recorded."""
        if self._logits is not None:
            self._logits.append(logits.detach().float().clone())

    def take(self) -> Tensor | None:
        """Returns the logits since the start [samples, c or k] and records no more; None on a rank without any."""
        found, self._logits = self._logits, None
        return torch.cat(found).cpu() if found else None


class Classification:
    """Cross entropy of classes [nats per sample].

    The label of a sample is that of the first token of its first sequence, and counts where its loss mask is 1.
    """

    def __init__(self, choices: int = 1, scores: ClassScores | None = None) -> None:
        """Takes the settings.

        Args:
            choices: answers of a question, whose logits are one choice together; 1 for classes.
            scores: receives the logits of evaluations.
        """
        self._choices, self._scores = choices, scores

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
        """Returns the sum over the micro batch's labeled samples, divided by `tokens`: an fp32 scalar.

        Args:
            logits: [b * c, k].
            labels: class of each sample, in its first position [b * c, s].
            loss_mask: 1 there where a sample is labeled [b * c, s].
            axis: tensor-parallel ranks, which all have the same logits.
            tokens: the engine's divisor, which counts samples here.
            vocabulary: not used; objectives have one signature.
        """
        if self._choices > 1:
            logits = logits.view(-1, self._choices)  # [b, c]
        if self._scores is not None and not torch.is_grad_enabled():
            self._scores.add(logits)
        losses = F.cross_entropy(logits.float(), labels[:: self._choices, 0], reduction="none")  # [b]
        return (losses * (loss_mask[:: self._choices, 0].float() / tokens)).sum()
