"""Which layers each pipeline stage holds, as DeepSpeed deals them out.

The layers are those of the model's layer plan: the embedding, an empty one, the blocks, an empty one, the final norm
and the output layer. Source: deepspeed.runtime.utils (partition_uniform, partition_balanced) and
deepspeed.runtime.pipe.module (the partition methods), release 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate


def layer_classes(num_layers: int) -> list[str]:
    """The class name of each layer of the plan, which `type:REGEX` looks at."""
    return ["EmbeddingLayer", "Glue", *["TransformerBlock"] * num_layers, "Glue", "FinalNorm", "Head"]


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
    """The cut with the least difference between the heaviest and the lightest stage; late cuts win ties."""
    count = len(weights)
    if count <= parts:
        return uniform(count, parts)
    sums = [0, *accumulate(weights)]
    infinite = float("inf")
    heaviest: list[float] = [0.0] + [infinite] * count
    lightest: list[float] = [infinite] * (count + 1)
    cuts: list[list[int]] = []
    for part in range(1, parts + 1):
        next_heaviest, next_lightest, cut = [infinite] * (count + 1), [infinite] * (count + 1), [0] * (count + 1)
        for end in range(part, count + 1):
            best = infinite
            for start in range(part - 1, end):
                weight = sums[end] - sums[start]
                heavy, light = max(heaviest[start], weight), min(lightest[start], weight)
                if heavy - light <= best:
                    best, next_heaviest[end], next_lightest[end], cut[end] = heavy - light, heavy, light, start
        heaviest, lightest = next_heaviest, next_lightest
        cuts.append(cut)
    bounds = [count]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return bounds[::-1]
