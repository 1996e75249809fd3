"""Soft prompt: learned vectors before every sequence (arXiv:2104.08691, section 2).

The tokens of a sequence begin with a placeholder for each vector, whose embedding is replaced. So a prompt takes
positions 0, 1, ... and the layers after the embedding see a sequence of the usual length.

Shapes: n vectors of the prompt, s sequence, b micro batch, h hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron.adapter_config import SoftPrompt
from megatron.distributed.param_attrs import mark_embedding_like
from megatron.distributed.param_init import ParamFactory


class SoftPromptEmbedding(nn.Module):
    """Parameter ``weight`` [n, h], replicated on every rank."""

    def __init__(self, spec: SoftPrompt, hidden_size: int, source: ParamFactory) -> None:
        super().__init__()

        def init_fn(tensor: Tensor, generator: torch.Generator) -> None:
            tensor.uniform_(-spec.init_range, spec.init_range, generator=generator)

        self.weight = source.replicated("weight", (spec.num_tokens, hidden_size), init_fn)
        mark_embedding_like(self.weight)

    def forward(self, hidden: Tensor, first: int, positions: Tensor | None = None) -> Tensor:
        """Replaces vectors [s, b, h] of positions that belong to the prompt.

        Ranks without any of these positions take part with no rows: their term of the gradient is zero.

        Args:
            hidden: Vectors of the tokens.
            first: Position of the first of them.
            positions: Their positions [1, s], where they do not follow each other; increasing.
        """
        count, length = self.weight.shape[0], hidden.shape[0]
        if positions is not None:
            rows = self.weight[positions[0].clamp(max=count - 1)].unsqueeze(1)  # [s, 1, h]
            return torch.where((positions[0] < count)[:, None, None], rows, hidden)
        begin = min(first, count)
        rows = self.weight[begin : min(first + length, count)]
        return torch.cat((rows.unsqueeze(1).expand(-1, hidden.shape[1], -1), hidden[len(rows) :]))
