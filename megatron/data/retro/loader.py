"""Micro-batches of a model that attends to neighbours: tokens of the neighbours in front of each text.

Shapes: b micro batch, s sequence, l chunks of a sequence, k neighbours of a chunk, r tokens of a neighbour.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.data.dataset.batch import MicroBatch
from megatron.data.dataset.gpt_dataset import Samples
from megatron.data.dataset.loader import BatchLoader
from megatron.data.dataset.sampler import BatchSampler
from megatron.data.retro.chunks import KEY, ChunkDatabase, open_files
from megatron.data.retro.neighbors import HINT, INDEX, PROBE, NeighborFile, fingerprint, read_header, require_same
from megatron.errors import ConfigError
from megatron.param_table import RetroDims


@dataclass(frozen=True)
class RetroData:
    """What loaders of neighbours are made from."""

    folder: Path
    """The database."""
    sizes: RetroDims
    """Of chunks and neighbours."""
    eod: int
    """The id that fills neighbours up."""
    tokenizer: str
    """Fingerprint of the run's tokenizer."""
    counts: Mapping[str, int]
    """Samples of each split that the run reads."""

    def loader(self, split: str, samples: Samples, sampler: BatchSampler, **settings: Any) -> RetroLoader:
        """Returns the loader of a rank. Raises ConfigError where the neighbours are those of other samples.

        Args:
            split: train, valid or test.
            samples: of the split.
            sampler: the rank's share of it.
            settings: further settings of a BatchLoader.
        """
        if split not in self.counts:
            what = "neighbours are those of one validation set"
            raise ConfigError.of(what, key="valid_data_paths", hint="give one, or leave out what reports each")
        count = self.counts[split]
        expected = {
            "chunk_length": self.sizes.chunk,
            "tokenizer": self.tokenizer,
            split: {"samples": count, "fingerprint": fingerprint(samples, count)},
        }
        require_same(self.folder, self._facts, expected)
        stored = NeighborFile(self.folder, split, writes=False)
        if stored.missing:
            what = f"{len(stored.missing)} blocks of the split {split} have no neighbours yet"
            raise ConfigError.of(what, key=KEY, value=str(self.folder), hint=HINT)
        if stored.rows.shape[2] < self.sizes.neighbors:
            what = f"{stored.rows.shape[2]} neighbours of a chunk are stored"
            hint = "lower it, or build another database"
            raise ConfigError.of(what, key="retro_num_neighbors", value=self.sizes.neighbors, hint=hint)
        return RetroLoader(samples, sampler, neighbors=(stored, self._database, self.sizes), eod=self.eod, **settings)

    def order_facts(self) -> dict[str, Any]:
        """Returns a fingerprint of the chunks, the encoder and the index, which decided what is near, by its key."""
        decided = {name: self._facts[name] for name in ("chunk_length", "digests", "documents", PROBE)}
        if (index := self._facts.get(INDEX)) is not None:  # that of the exact search is left out
            decided[INDEX] = index
        return {KEY: hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:16]}

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return read_header(self.folder)

    @cached_property
    def _database(self) -> ChunkDatabase:
        return ChunkDatabase(self.folder, open_files(self.folder, self._facts), self.eod)


class RetroLoader(BatchLoader):
    """The micro-batches of one rank: neighbours and text [b, l k r + s], labels of the text [b, s]."""

    def __init__(
        self,
        samples: Samples,
        sampler: BatchSampler,
        *,
        neighbors: tuple[NeighborFile, ChunkDatabase, RetroDims],
        **settings: Any,
    ) -> None:
        """Takes the samples of a rank.

        Args:
            samples: The data set.
            sampler: The rank's share of it.
            neighbors: numbers of the neighbours, the chunks that they are, and their sizes.
            settings: Further settings of a BatchLoader.
        """
        super().__init__(samples, sampler, **settings)
        self._stored, self._database, self._sizes = neighbors

    def _made(self, numbers: range) -> MicroBatch:
        batch = super()._made(numbers)
        sizes = self._sizes
        rows = np.asarray(self._stored.rows[numbers.start : numbers.stop, :, : sizes.neighbors])
        tokens = np.empty((rows.size, sizes.neighbor_tokens), np.int64)
        for each, number in zip(tokens, rows.flatten().tolist(), strict=True):
            self._database.read(number, each)
        neighbors = torch.from_numpy(tokens).view(len(numbers), -1)
        return replace(batch, tokens=torch.cat((neighbors, batch.tokens), dim=1))
