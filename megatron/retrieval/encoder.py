"""Embeddings of texts by one of the two encoders of a loaded model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron.data.dataset.document_starts import document_starts
from megatron.data.retrieval.rows import framed, write_row
from megatron.distributed.process_group import device
from megatron.engine.inference_engine import InferenceEngine
from megatron.model.recompute import run_layers
from megatron.tokenizer_info import ClassTokens, EncodingTokenizer


class TextEncoder:
    """One encoder with its tokenizer."""

    def __init__(
        self,
        engine: InferenceEngine,
        tokenizer: EncodingTokenizer,
        ids: ClassTokens,
        *,
        tower: int,
        towers: int,
        seq_length: int,
        types: bool,
    ) -> None:
        """Takes the settings.

        Args:
            engine: the loaded model.
            tokenizer: its tokenizer.
            ids: of separators and padding.
            tower: 0 for queries, 1 for passages.
            towers: encoders of the model.
            seq_length: most tokens of a text.
            types: whether the model has embeddings of token types, which all are 0.
        """
        layers = engine.stage.functions
        count = len(layers) // towers
        first = count * min(tower, towers - 1)
        self._layers = layers[first : first + count]
        self._tokenizer, self._ids, self._length, self._types = tokenizer, ids, seq_length, types

    def rows(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Returns the token ids of texts with their titles, "" for none."""
        encode = self._tokenizer.encode
        return [
            framed(self._ids, encode(text), encode(title) if title else None, self._length) for title, text in texts
        ]

    @torch.inference_mode()
    def embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Returns the embeddings of token ids in fp32 [b, d]; padded to the longest of them."""
        length = max(map(len, rows))
        tokens, borders = np.empty((len(rows), length), np.int64), np.zeros((len(rows), length), bool)
        for number, row in enumerate(rows):
            write_row(tokens[number], borders[number], row, self._ids.pad)
        inputs = torch.from_numpy(tokens)
        starts = document_starts(inputs, torch.from_numpy(borders), None).to(device())
        inputs = torch.stack([inputs, torch.zeros_like(inputs)]) if self._types else inputs
        return run_layers(self._layers, inputs.to(device()), None, None, starts).float()

    def embed_sorted(self, rows: Sequence[Sequence[int]], batch: int) -> Tensor:
        """Returns the embeddings of token ids in their order [n, d].

        Args:
            rows: token ids of each text.
            batch: texts of one pass; texts of about the same length are in one, so that few tokens are padding.
        """
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        found = [self.embed([rows[number] for number in order[at : at + batch]]) for at in range(0, len(rows), batch)]
        return torch.cat(found)[torch.argsort(torch.tensor(order))]
