"""Layer 0: word embeddings, and positions and token types that are added to them.

Shapes: b micro batch, s sequence, h hidden, v padded vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.adapter_config import soft_prompt
from megatron.distributed.context_parallel.sequence_shards import SequenceShards
from megatron.distributed.param_attrs import mark_tied
from megatron.distributed.param_init import InitFn, PaddedInit, ParamFactory
from megatron.distributed.tensor_parallel.embedding import VocabParallelEmbedding
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.model.block_spec import BlockSpec
from megatron.model.kv_cache import KVCache
from megatron.model.model_spec import ModelSpec
from megatron.model.positions.base import document_positions
from megatron.model.scales import scaled
from megatron.model.soft_prompt import SoftPromptEmbedding
from megatron.registry import POSITIONS


class TokenTypes(nn.Module):
    """One vector for each segment of a sample (arXiv:1810.04805), replicated."""

    def __init__(self, count: int, hidden: int, source: ParamFactory, init_fn: InitFn) -> None:
        """Creates the vectors.

        Args:
            count: number of types.
            hidden: width of a vector.
            source: creates the parameter.
            init_fn: initial values.
        """
        super().__init__()
        self.weight = source.replicated("weight", (count, hidden), init_fn)

    def forward(self, types: Tensor) -> Tensor:
        """Types of any shape [...] -> vectors [..., h]."""
        return F.embedding(types, self.weight)


class EmbeddingLayer(nn.Module):
    """Word embeddings, positions and dropout."""

    def __init__(self, spec: ModelSpec, blocks: BlockSpec, *, as_output_copy: bool = False) -> None:
        """Builds the layer with its initial values.

        Args:
            spec: spec of the model.
            blocks: spec of the blocks; its initial values and dropout apply here too.
            as_output_copy: builds a copy without positions, which is the output layer of a pipeline's last stage.
        """
        super().__init__()
        source = spec.param_factory(0)
        self.scales, self.multiplier = spec.scales, spec.multipliers.embedding
        self.output_multiplier = spec.multipliers.output * spec.scales.logits
        self.reset_positions = spec.reset_positions
        self.dropout = blocks.hidden_dropout
        self.axis, self.shards = source.axis, SequenceShards.of(spec.topology)
        self.draws = spec.rng.fork if source.axis.sequence_parallel and self.dropout > 0 else nullcontext
        self.word_embeddings = VocabParallelEmbedding(
            spec.padded_vocab_size,
            spec.dims.hidden_size,
            source.of("word_embeddings"),
            init_fn=PaddedInit(blocks.init_fn, spec.vocab_size or spec.padded_vocab_size),
            kernel=spec.kernels.linear,
            softmax=spec.kernels.cross_entropy,
            bound=spec.scales.logit_bound,
        )
        if spec.dims.tied or spec.dims.mtp_layers:  # both ends of a pipeline have it
            mark_tied(self.word_embeddings.weight)
        self.position_embeddings: nn.Module | None = None
        self.tokentype_embeddings: TokenTypes | None = None
        self.embedding_norm: nn.Module | None = None
        self.soft_prompt: SoftPromptEmbedding | None = None
        if not as_output_copy:
            positions = POSITIONS.load(spec.model.pos_emb)
            self.position_embeddings = positions.for_embedding(
                spec.model, source.of("position_embeddings"), blocks.init_fn
            )
            if spec.dims.token_types:
                self.tokentype_embeddings = TokenTypes(
                    spec.dims.token_types, spec.dims.hidden_size, source.of("tokentype_embeddings"), blocks.init_fn
                )
            if spec.dims.embedding_norm:
                self.embedding_norm = blocks.norm()
            prompt = soft_prompt(spec.model.soft_prompt_tuning)
            if prompt is not None:
                self.soft_prompt = SoftPromptEmbedding(prompt, spec.dims.hidden_size, source.of("soft_prompt"))
        self.to(spec.dtype)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, document_starts: Tensor | None = None) -> Tensor:
        """Token ids [b, s] -> hidden [s, b, h], or [s/t, b, h] with sequence parallelism.

        tokens: [2, b, s] with their types; without them all are 0. document_starts [b, s]: start of the document of
        each token.
        """
        tokens, types = tokens if tokens.dim() == 3 else (tokens, None)
        hidden = scaled(self.word_embeddings(tokens.t()), self.scales.words)  # [s, b, h]
        length, first = hidden.shape[0], self._first(tokens.shape[1], cache)
        at = self._positions(tokens.shape[1], length, hidden.device) if cache is None else None
        if self.soft_prompt is not None:
            hidden = self.soft_prompt(hidden, first, at)
        hidden = scaled(hidden, self.scales.embedding)
        if self.position_embeddings is not None:
            in_document = document_positions(document_starts) if self.reset_positions else None
            if in_document is not None:
                at = in_document[:, first : first + length] if at is None else in_document[:, at[0]]
            if cache is not None:
                at = cache.slots(length).positions
            hidden = hidden + self.position_embeddings(length, first, at, hidden.device)
        if self.tokentype_embeddings is not None:
            types = torch.zeros_like(tokens) if types is None else types
            begin = self.axis.rank * length if self.axis.sequence_parallel else 0
            hidden = hidden + self.tokentype_embeddings(types.t()[begin : begin + length])
        if self.multiplier != 1.0:
            hidden = hidden * self.multiplier
        if self.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        if self.dropout == 0 or not self.training:
            return hidden
        with self.draws():
            return F.dropout(hidden, self.dropout)

    def _first(self, length: int, cache: KVCache | None) -> int:
        """Returns the position of the first vector on this rank, which has `length` tokens.

        Where the positions do not follow each other, returns the first one of the last rank's shard in order.
        """
        shards = self.shards
        if cache is not None:
            first = cache.length
        else:
            first = shards.first(length) if shards.in_order else (shards.context.size - 1) * length
        return first + (self.axis.rank * length // self.axis.size if self.axis.sequence_parallel else 0)

    def _positions(self, tokens: int, length: int, device: torch.device) -> Tensor | None:
        """Returns the positions of this rank's vectors, [1, length], or None where they follow each other.

        Args:
            tokens: Tokens of this rank's shard.
            length: Vectors of this rank, fewer where sequence parallelism shards them further.
            device: Device of the result.
        """
        if self.shards.in_order:
            return None
        begin = self.axis.rank * length if self.axis.sequence_parallel else 0
        return self.shards.positions(tokens, device)[None, begin : begin + length]

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the tied output layer [v/t, h]."""
        return self.word_embeddings.weight

    def output(self, hidden: Tensor, targets: TokenTargets | None = None) -> Tensor:
        """Computes the tied output layer: hidden [s, b, h] -> logits [s, b, v/t], or the loss of the targets."""
        if self.output_multiplier != 1.0:
            hidden = hidden * self.output_multiplier
        return self.word_embeddings(hidden, as_output_layer=True, targets=targets)
