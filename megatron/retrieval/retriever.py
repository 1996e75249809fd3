"""Finds the neighbours of the chunks of a text while it is generated.

Shapes: b texts, s tokens of a text, l whole chunks, k neighbours of a chunk, r tokens of a neighbour.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron.config import Config
from megatron.config.validation.unknown_values import require
from megatron.data.retro import neighbors
from megatron.data.retro.chunks import KEY, ChunkDatabase, open_files
from megatron.distributed.process_group import device
from megatron.engine.engine import Engine
from megatron.engine.inference_engine import InferenceEngine
from megatron.engine.retro import RetroEngine
from megatron.param_table import RetroDims
from megatron.retrieval.embedding_file import EmbeddingFile
from megatron.retrieval.neighbors import nearest_elsewhere
from megatron.retrieval.retro_database import EMBEDDINGS, require_embedder
from megatron.retrieval.text_embedder import TextEmbedder
from megatron.tokenizer_info import describe_tokenizer
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.vocab_limit import full_tokenizer

BATCH = 64
"""Chunks of one pass of the encoder."""
NO_DOCUMENTS = np.empty(0, np.int64)


class Retriever:
    """A database with its encoder. What was found for the chunks of the last texts is remembered."""

    def __init__(self, config: Config, tokenizer: Tokenizer, sizes: RetroDims) -> None:
        """Opens `retro_project_dir`.

        Raises ConfigError where it was made with another tokenizer, encoder or length of chunks, RunError where it
        cannot be read.

        Args:
            config: of the model.
            tokenizer: of the model.
            sizes: of chunks and neighbours.
        """
        folder = Path(require(config.retrieval.retro_project_dir))
        facts, self._sizes = neighbors.read_header(folder), sizes
        info = describe_tokenizer(config.tokenizer.tokenizer_type, full_tokenizer(tokenizer))
        self._embedder = TextEmbedder(Path(require(config.retrieval.retro_embedder)))
        neighbors.require_same(folder, facts, {"chunk_length": sizes.chunk, "tokenizer": info.fingerprint or ""})
        require_embedder(folder, facts, self._embedder)
        stored = EmbeddingFile(folder / EMBEDDINGS, writes=False)
        stored.require_complete(folder, key=KEY, hint=neighbors.HINT)
        self._database = ChunkDatabase(folder, open_files(folder, facts), tokenizer.eod)
        self._vectors = stored.rows
        self._owners, self._tokenizer = self._database.owners(), tokenizer
        self._found: dict[bytes, np.ndarray] = {}

    def __call__(self, tokens: Tensor) -> Tensor:
        """Token ids [b, s] -> those of the neighbours of each whole chunk [b, l k r]."""
        count = tokens.shape[1] // self._sizes.chunk
        rows = tokens[:, : count * self._sizes.chunk].cpu().numpy().reshape(-1, self._sizes.chunk)
        keys = [row.tobytes() for row in rows]
        self._found = {key: self._found[key] for key in keys if key in self._found}  # texts grow, and have the rest
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._found}
        if new:
            self._search(new)
        found = np.empty((len(rows), self._sizes.neighbors, self._sizes.neighbor_tokens), np.int64)
        for own, key in zip(found, keys, strict=True):
            for each, number in zip(own, self._found[key].tolist(), strict=True):
                self._database.read(number, each)
        return torch.from_numpy(found).view(len(tokens), -1)

    def _search(self, new: dict[bytes, np.ndarray]) -> None:
        texts = [self._tokenizer.decode(row[row != self._tokenizer.eod].tolist()) for row in new.values()]
        questions = torch.from_numpy(self._embedder.embed(texts, BATCH)).to(device())
        found = nearest_elsewhere(questions, self._vectors, self._owners, [NO_DOCUMENTS], self._sizes.neighbors)
        self._found.update(zip(new, found, strict=True))


def with_retrieval(config: Config, engine: Engine, tokenizer: Tokenizer) -> Engine:
    """Returns an engine that finds neighbours where the model attends to them, else the given one.

    Args:
        config: of the model.
        engine: with all layers of the model.
        tokenizer: of the model.
    """
    sizes = RetroDims.of(config.model)
    if sizes is None:
        return engine
    assert isinstance(engine, InferenceEngine), engine
    return RetroEngine(engine.stage.functions, engine.topology, sizes, Retriever(config, tokenizer, sizes))
