"""Which layers each pipeline stage holds, as DeepSpeed deals them out.

The layers are those of the model's layer plan: the embedding, an empty one, the blocks, an empty one, the final norm
and the output layer. Source: deepspeed.runtime.utils (partition_uniform, partition_balanced) and
deepspeed.runtime.pipe.module (the partition methods), release 0.19.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


def stage_bounds(
    method: str | tuple[int, ...], classes: Sequence[str], parameters: Sequence[int], stages: int
) -> list[int]:
    """The first layer of each stage, and the number of layers at the end: stage i holds bounds[i] .. bounds[i + 1].

    method: pipe_partition_method; a tuple holds the blocks of each stage, of which the first has the embedding too and
    the last the final norm and the output layer. parameters: their number in each layer. ValueError for an unknown
    method.
    """
    if isinstance(method, tuple):
        return [0, *(2 + blocks for blocks in accumulate(method[:-1])), len(classes)]
    kind = method.lower()
    if kind == "uniform":
        return uniform(len(classes), stages)
    if kind == "parameters":
        return balanced(parameters, stages)
    if kind.startswith("type:"):
        pattern = re.compile(kind.partition(":")[2], re.IGNORECASE)
        return balanced([1 if pattern.search(name) else 0 for name in classes], stages)
    raise ValueError(f"there is no partition method {method}")


def uniform(count: int, parts: int) -> list[int]:
    """Equal numbers of layers; the first stages take what is left over."""
    if count <= parts:
        return [min(part, count) for part in range(parts + 1)]
    share, left = divmod(count, parts)
    return [part * share + min(part, left) for part in range(parts + 1)]


def balanced(weights: Sequence[int], parts: int) -> list[int]:
    """The cut with the least difference between the heaviest and the lightest stage; late cuts win ties.

    Dynamic programming over (stages, layers). DeepSpeed tries every last cut, which takes seconds for deep models; here
    only those are tried that could still win (see `_last_cut`).
    """
    count = len(weights)
    if count <= parts:
        return uniform(count, parts)
    sums = [0, *accumulate(weights)]
    heaviest: list[float] = [float(total) for total in sums]
    lightest = list(heaviest)
    cuts: list[list[int]] = [[0] * (count + 1)]
    for part in range(2, parts + 1):
        next_heaviest, next_lightest, cut = [0.0] * (count + 1), [0.0] * (count + 1), [0] * (count + 1)
        for end in range(part, count + 1):
            start = _last_cut(sums, heaviest, lightest, part, end)
            weight = sums[end] - sums[start]
            next_heaviest[end], next_lightest[end] = max(heaviest[start], weight), min(lightest[start], weight)
            cut[end] = start
        heaviest, lightest = next_heaviest, next_lightest
        cuts.append(cut)
    bounds = [count]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return bounds[::-1]


def _last_cut(sums: Sequence[int], heaviest: Sequence[float], lightest: Sequence[float], part: int, end: int) -> int:
    """Where the last of `part` stages that end at `end` begins.

    The mean of the stages before it lies between their heaviest and their lightest, so the difference is at least that
    between the last stage and this mean. That bound grows on both sides of the start where the two are equal, and the
    search ends where it exceeds the best difference found.
    """
    before = part - 1
    middle = bisect_left(range(before, end), sums[end] * before / part, key=lambda start: sums[start]) + before
    best, chosen = float("inf"), before
    for starts in (range(min(middle, end - 1), before - 1, -1), range(middle + 1, end)):
        for start in starts:
            weight = sums[end] - sums[start]
            if abs(weight - sums[start] / before) > best + 0.5:
                break
            difference = max(heaviest[start], weight) - min(lightest[start], weight)
            if difference < best or (difference == best and start > chosen):
                best, chosen = difference, start
    return chosen
