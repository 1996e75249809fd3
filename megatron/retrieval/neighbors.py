"""Exact search of the nearest chunks of other documents, over blocks of a database.

Shapes: q questions, n chunks, d width of an embedding, k results.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron.retrieval.search import ROWS, best


def nearest_elsewhere(
    questions: Tensor, vectors: np.ndarray, owners: np.ndarray, left_out: Sequence[np.ndarray], count: int
) -> np.ndarray:
    """Returns the numbers of the nearest chunks by Euclidean distance, the nearest first, int32 [q, k]; -1 for none.

    Embeddings that are not numbers are near nothing. Of two chunks of the same distance the first one comes first.

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
        near = 2 * questions @ block.t() - block.square().sum(1)  # the square of the question is the same for all
        near = near.nan_to_num(nan=-torch.inf)
        for group, documents in enumerate(left_out):
            hidden = torch.from_numpy(np.isin(owners[start : start + ROWS], documents)).to(near.device)
            near[group * each : (group + 1) * each].masked_fill_(hidden, -torch.inf)
        found = near.topk(min(count, len(block)))
        scores = torch.cat([scores, found.values], 1)
        numbers = torch.cat([numbers, found.indices + start], 1)
        scores, numbers = best(scores, numbers, count)
    numbers = numbers.masked_fill(scores == -torch.inf, -1)
    filled = torch.nn.functional.pad(numbers, (0, count - numbers.shape[1]), value=-1)
    return filled.to(torch.int32).cpu().numpy()
