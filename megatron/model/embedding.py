"""Layer 0: tokens become vectors, with positions added where the scheme adds them here.

Shapes: b micro batch, s sequence, h hidden, v padded vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.adapter_config import SoftPrompt
from megatron.distributed.mesh import Axis
from megatron.distributed.param_attrs import mark_tied
from megatron.distributed.param_init import Fill, ParamFactory
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.distributed.tensor_parallel.embedding import VocabParallelEmbedding
from megatron.kernels.linear import LinearKernel
from megatron.model.kv_cache import KVCache
from megatron.model.positions.base import Positions, document_positions
from megatron.model.soft_prompt import LearnedPrompt


class EmbeddingLayer(nn.Module):
    """Word embeddings, positions and dropout.

    fill, position_fill: initial values of words and positions. positions: the scheme, or None for a copy that only
    serves as the output layer of a pipeline's last stage. model: the configuration's model section, read by the
    position scheme. tied: the word embedding is the output layer's matrix too. context: the ranks that share a
    sequence. random: for dropout on a cut sequence. reset_positions: positions start again with each document.
    prompt: a learned one takes the first positions. multiplier: of what it puts out. output_multiplier: of what it
    takes in as the output layer.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        source: ParamFactory,
        *,
        fill: Fill,
        position_fill: Fill,
        kernel: LinearKernel,
        positions: type[Positions] | None,
        model: object,
        dropout: float,
        tied: bool,
        dtype: torch.dtype,
        context: Axis,
        random: TensorParallelRNG,
        reset_positions: bool = False,
        multiplier: float = 1.0,
        output_multiplier: float = 1.0,
        prompt: SoftPrompt | None = None,
    ) -> None:
        super().__init__()
        self.multiplier, self.output_multiplier = multiplier, output_multiplier
        self.reset_positions = reset_positions
        self.dropout = dropout
        self.axis, self.context = source.axis, context
        self.draws = random.fork if source.axis.sequence and dropout > 0 else nullcontext
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size, hidden_size, source.of("word_embeddings"), fill=fill, kernel=kernel
        )
        if tied:
            mark_tied(self.word_embeddings.weight)
        self.position_embeddings = (
            positions.for_embedding(model, source.of("position_embeddings"), position_fill)
            if positions is not None
            else None
        )
        self.soft_prompt: LearnedPrompt | None = None
        if prompt is not None and positions is not None:
            self.soft_prompt = LearnedPrompt(prompt, hidden_size, source.of("soft_prompt"))
        self.to(dtype)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """Token ids [b, s] -> hidden [s, b, h], or [s/t, b, h] with sequence parallelism.

        document_starts [b, s]: where the document of each token starts.
        """
        hidden = self.word_embeddings(tokens.t())  # [s, b, h]
        length, first = hidden.shape[0], self._first(tokens.shape[1], cache)
        if self.soft_prompt is not None:
            hidden = self.soft_prompt(hidden, first)
        if self.position_embeddings is not None:
            positions = document_positions(document_starts) if self.reset_positions else None
            if positions is not None:
                positions = positions[:, first : first + length]
            if cache is not None:
                positions = cache.place(length).positions
            hidden = hidden + self.position_embeddings(length, first, positions, hidden.device)
        if self.multiplier != 1.0:
            hidden = hidden * self.multiplier
        if self.dropout == 0 or not self.training:
            return hidden
        with self.draws():
            return F.dropout(hidden, self.dropout)

    def _first(self, length: int, cache: KVCache | None) -> int:
        """The position of the first vector on this rank, of `length` tokens that this rank has been given."""
        first = self.context.rank * length if cache is None else cache.length
        return first + (self.axis.rank * length // self.axis.size if self.axis.sequence else 0)

    def logits(self, hidden: Tensor) -> Tensor:
        """The tied output layer: hidden [s, b, h] -> logits [s, b, v/t]."""
        if self.output_multiplier != 1.0:
            hidden = hidden * self.output_multiplier
        return self.word_embeddings(hidden, as_output_layer=True)
