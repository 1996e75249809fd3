"""Search of the nearest chunks of other documents: exact, over blocks of a database, or by an index.

Shapes: q questions, n chunks, d width of an embedding, k results.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron.retrieval.faiss_index import FaissIndex
from megatron.retrieval.search import QUESTIONS, ROWS, best, first_best


def nearest_elsewhere(
    questions: Tensor, vectors: np.ndarray, owners: np.ndarray, left_out: Sequence[np.ndarray], count: int
) -> np.ndarray:
    """Returns the numbers of the nearest chunks by Euclidean distance, the nearest first, int32 [q, k]; -1 for none.

    Of chunks of the same distance the first ones are found. Embeddings that are not numbers are near nothing.

    Args:
        questions: embeddings in fp32 [q, d].
        vectors: embeddings of the database [n, d].
        owners: document of each chunk [n].
        left_out: documents whose chunks are left out, for each of as many equal groups of consecutive questions.
        count: k.
    """
    each = len(questions) // len(left_out)
    scores, numbers = questions.new_empty(len(questions), 0), questions.new_empty(len(questions), 0).long()
    for start in range(0, len(vectors), ROWS):
        block = torch.from_numpy(np.array(vectors[start : start + ROWS], np.float32)).to(questions.device)
        groups = max(1, QUESTIONS // each)
        found = [
            first_best(_near(questions[first * each :][: groups * each], block, owners[start : start + ROWS],
                             left_out[first : first + groups]), min(count, len(block)))
            for first in range(0, len(left_out), groups)
        ]  # fmt: skip
        scores = torch.cat([scores, torch.cat([one[0] for one in found])], 1)
        numbers = torch.cat([numbers, torch.cat([one[1] for one in found]) + start], 1)
        scores, numbers = best(scores, numbers, count)
    numbers = numbers.masked_fill(scores == -torch.inf, -1)
    filled = torch.nn.functional.pad(numbers, (0, count - numbers.shape[1]), value=-1)
    return filled.to(torch.int32).cpu().numpy()


def nearest_by_index(
    index: FaissIndex, questions: Tensor, owners: np.ndarray, left_out: Sequence[np.ndarray], count: int
) -> np.ndarray:
    """Returns what nearest_elsewhere does, by an index of faiss, which may compare with the chunks of some cells alone.

    Chunks of documents that are left out are never found.

    Args:
        index: of the database, by distance.
        questions: embeddings in fp32 [q, d].
        owners: document of each chunk [n], in order.
        left_out: as for nearest_elsewhere.
        count: k.
    """
    found = torch.full((len(questions), count), -1)
    each = len(questions) // len(left_out)
    for number, documents in enumerate(left_out):
        borders = [np.searchsorted(owners, documents, side) for side in ("left", "right")]
        chunks = [np.arange(*border) for border in zip(*borders, strict=True)]
        own = slice(number * each, (number + 1) * each)
        numbers = index.nearest(questions[own], count, np.concatenate([np.empty(0, np.int64), *chunks]))[1]
        found[own, : numbers.shape[1]] = numbers
    return found.masked_fill(~questions.isfinite().all(1, keepdim=True).cpu(), -1).to(torch.int32).numpy()


def _near(questions: Tensor, block: Tensor, owners: np.ndarray, left_out: Sequence[np.ndarray]) -> Tensor:
    """Returns how near the chunks of a block are, [q, n]: the squared distance less that of the question to 0, negated.

    Args:
        questions: [q, d].
        block: [n, d].
        owners: [n].
        left_out: as for nearest_elsewhere.
    """
    near = (2 * questions @ block.t() - block.square().sum(1)).nan_to_num_(nan=-torch.inf)
    for own, documents in zip(near.chunk(len(left_out)), left_out, strict=True):
        own.masked_fill_(torch.from_numpy(np.isin(owners, documents)).to(near.device), -torch.inf)
    return near
