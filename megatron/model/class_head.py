"""Layer L+4 of a classifier: a dense layer and tanh on the first token (the pooler), dropout, a logit for each class.

A multiple-choice model has one logit, for each answer of a question. Source: arXiv:1810.04805, sections 4.1 and 4.4.

Shapes: s sequence, b sequences, h hidden, k classes, t tensor-parallel degree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.distributed.collectives import reduce_from
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import KVCache
from megatron.model.masked_head import ReplicatedLinear
from megatron.model.model_spec import ModelSpec


class ClassHead(nn.Module):
    """Logits of classes from the first token of each sequence."""

    def __init__(self, spec: ModelSpec, blocks: BlockSpec) -> None:
        """Builds the head with its initial values.

        Args:
            spec: spec of the model.
            blocks: spec of the blocks; its initial values and dropout apply here too.
        """
        super().__init__()
        dims, source = spec.dims, spec.param_factory(spec.dims.num_layers + 4)
        self.axis, self.dropout = source.axis, blocks.hidden_dropout
        self.pooler = ReplicatedLinear(dims.hidden_size, dims.hidden_size, source.of("pooler"), blocks)
        self.classifier = ReplicatedLinear(dims.hidden_size, dims.classes, source.of("classifier"), blocks)
        self.to(spec.dtype)

    def forward(
        self,
        hidden: Tensor,
        cache: KVCache | None = None,
        document_starts: Tensor | None = None,
        targets: TokenTargets | None = None,
    ) -> Tensor:
        """Output of the final norm [s, b, h], [s/t, b, h] with sequence parallelism -> logits [b, k].

        Args:
            hidden: Output of the final norm [s, b, h].
            cache: Not used; layers have one signature.
            document_starts: Not used; layers have one signature.
            targets: None; the loss is computed from logits.
        """
        pooled = torch.tanh(self.pooler(hidden[0]))  # [b, h]
        logits: Tensor = self.classifier(F.dropout(pooled, self.dropout, self.training))  # [b, k]
        if self.axis.sequence_parallel:  # the first rank has the first token
            logits = reduce_from(logits if self.axis.rank == 0 else logits * 0.0, self.axis)
        return logits
