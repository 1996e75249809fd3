"""The passages of questions: found exactly by all ranks, or by an index of faiss on rank 0.

Shapes: q questions, n passages, d width of an embedding, k results.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from megatron.config.derived.retrieval import EXACT, IVF
from megatron.config.schema.retrieval import RetrievalSection
from megatron.distributed.mesh import Topology
from megatron.retrieval.faiss_index import KEY, FaissIndex, open_index
from megatron.retrieval.main_rank import on_main_rank
from megatron.retrieval.search import nearest

CHECKED = 100
"""Questions of a file that are also searched exactly, to measure an index that does not compare with all passages."""


class PassageFinder:
    """Finds passages as `retrieval_index` says."""

    def __init__(self, section: RetrievalSection, folder: Path, vectors: np.ndarray, topology: Topology) -> None:
        """Opens or builds the index. Collective over all ranks.

        Args:
            section: of the configuration.
            folder: of the embeddings.
            vectors: the embeddings [n, d].
            topology: of the ranks.

        Raises ConfigError where the folder has the index of other embeddings, RunError where it cannot be read or
        written.
        """
        self._kind, self._folder, self._probes = section.retrieval_index, folder, section.retrieval_ivf_probes
        self._vectors, self._topology = vectors, topology
        self._index: FaissIndex | None = None
        if self._kind != EXACT:
            on_main_rank(self._open, folder=folder, key=KEY)

    def __call__(self, questions: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Returns scores and numbers of the best passages [q, k], on rank 0. Collective over all ranks.

        Where an index finds fewer than k the rest has the number -1 and the score -inf.

        Args:
            questions: embeddings in fp32 [q, d].
            count: k.
        """
        if self._kind == EXACT:
            return nearest(questions, self._vectors, count, self._topology.data)
        if self._index is None:
            return questions.new_empty(0, count), questions.new_empty(0, count).long()
        return self._index.nearest(questions, count)

    def recall(self, questions: Tensor, numbers: Tensor) -> dict[str, float]:
        """Returns the share of the best passages of the first questions that an index found. Collective over all ranks.

        Empty where the search compares with all passages.

        Args:
            questions: embeddings in fp32 [q, d].
            numbers: what was found [q, k], on rank 0.
        """
        if self._kind != IVF:
            return {}
        _, exact = nearest(questions[:CHECKED], self._vectors, numbers.shape[1], self._topology.data)
        if self._index is None:
            return {}
        found = (exact[:, :, None] == numbers[:CHECKED, None]).any(2)
        return {"index_recall": float(found.double().mean())}

    def _open(self) -> None:
        self._index = open_index(self._kind, self._folder, self._vectors, self._probes)
