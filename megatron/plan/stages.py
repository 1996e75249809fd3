"""Layers of each pipeline stage, by DeepSpeed's partition methods.

The layers are: the embedding, an empty one, the blocks, an empty one, the final norm and the output layer. Source:
deepspeed.runtime.utils (partition_uniform, partition_balanced) and deepspeed.runtime.pipe.module, release 0.19.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


def stage_bounds(
    method: str | tuple[int, ...], classes: Sequence[str], parameters: Sequence[int], stages: int
) -> list[int]:
    """Returns the first layer of each stage, and the number of layers: stage i has bounds[i] .. bounds[i + 1] - 1.

    Raises ValueError for an unknown method.

    Args:
        method: pipe_partition_method; a tuple holds the number of blocks of each stage.
        classes: class name of each layer.
        parameters: number of parameters of each layer.
        stages: number of stages.
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
    """Returns bounds with equal numbers of layers; the first stages take the remainder."""
    if count <= parts:
        return [min(part, count) for part in range(parts + 1)]
    share, left = divmod(count, parts)
    return [part * share + min(part, left) for part in range(parts + 1)]


def balanced(weights: Sequence[int], parts: int) -> list[int]:
    """Returns the bounds with the least difference between the heaviest and the lightest stage; late bounds win ties.

    Dynamic programming over (stages, layers). DeepSpeed tries every last bound, which takes seconds for deep models;
    here only those are tried that could still win (see `_last_bound`).
    """
    count = len(weights)
    if count <= parts:
        return uniform(count, parts)
    sums = [0, *accumulate(weights)]
    heaviest: list[float] = [float(total) for total in sums]
    lightest = list(heaviest)
    starts: list[list[int]] = [[0] * (count + 1)]
    for part in range(2, parts + 1):
        next_heaviest, next_lightest, stage_starts = [0.0] * (count + 1), [0.0] * (count + 1), [0] * (count + 1)
        for end in range(part, count + 1):
            start = _last_bound(sums, heaviest, lightest, part, end)
            weight = sums[end] - sums[start]
            next_heaviest[end], next_lightest[end] = max(heaviest[start], weight), min(lightest[start], weight)
            stage_starts[end] = start
        heaviest, lightest = next_heaviest, next_lightest
        starts.append(stage_starts)
    bounds = [count]
    for stage_starts in reversed(starts):
        bounds.append(stage_starts[bounds[-1]])
    return bounds[::-1]


def _last_bound(sums: Sequence[int], heaviest: Sequence[float], lightest: Sequence[float], part: int, end: int) -> int:
    """Returns the first layer of the last of `part` stages that end at `end`.

    The mean of the stages before it is between their heaviest and their lightest, so the difference is at least that
    between the last stage and this mean. This bound grows on both sides of the start where the two are equal, and the
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
