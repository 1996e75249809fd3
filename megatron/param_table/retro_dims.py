"""Sizes of retrieval in a language model (Retro, arXiv:2112.04426): chunks, neighbours, blocks that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.retro_blocks import usual_blocks


@dataclass(frozen=True)
class RetroDims:
    """Sizes of the parts that read neighbours."""

    chunk: int
    """Tokens of a chunk."""
    neighbors: int
    """Neighbours of a chunk."""
    retrieved: int
    """Chunks of a neighbour: the one that was found and those that follow it."""
    encoder_layers: int
    """Blocks of the encoder of neighbours."""
    blocks: tuple[int, ...]
    """Decoder blocks with attention to neighbours (from 0); the first one has the encoder."""

    @classmethod
    def of(cls, model: Any) -> RetroDims | None:
        """Reads an object with the keys of the configuration's model section; None for a model without retrieval."""
        if not getattr(model, "retro_add_retriever", False):
            return None
        given = model.retro_cross_attention_layers
        return cls(
            model.retro_chunk_length,
            model.retro_num_neighbors,
            model.retro_num_retrieved_chunks,
            model.retro_encoder_layers,
            usual_blocks(model.num_layers) if given is None else tuple(given),
        )

    @property
    def neighbor_tokens(self) -> int:
        """Tokens of one neighbour."""
        return self.chunk * self.retrieved

    @property
    def tokens_of_chunk(self) -> int:
        """Tokens of the neighbours of one chunk."""
        return self.neighbors * self.neighbor_tokens

    def chunks(self, rows: int) -> int:
        """Returns the chunks of a sequence that has neighbours of each whole chunk before it.

        rows: tokens of neighbours and of the sequence.
        """
        return rows // (self.chunk + self.tokens_of_chunk)

    def neighbor_length(self, seq_length: int) -> int:
        """Returns the tokens of all neighbours of a sequence. seq_length: [tokens]."""
        return seq_length // self.chunk * self.tokens_of_chunk
