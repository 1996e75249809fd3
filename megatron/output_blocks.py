"""Sizes of the blocks of tokens in which the output layer and its loss are computed.

The computation is in distributed/tensor_parallel/linear_cross_entropy.py, the plan of its memory in plan/memory.py.
"""

from __future__ import annotations

_LOGITS = {True: 1 << 26, False: 1 << 28}
"""Logits of one block, on a CPU (256 MiB in fp32) and on a GPU (512 MiB in bfloat16)."""
_FEWEST_ROWS = 128
"""Tokens of a block, below which the matrix products become slow."""


def rows_of_a_block(vocabulary: int, *, cpu: bool) -> int:
    """Tokens of a block. vocabulary: logits of a token on this rank."""
    return max(_FEWEST_ROWS, _LOGITS[cpu] // max(1, vocabulary))
