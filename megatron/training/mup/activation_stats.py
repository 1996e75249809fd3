"""Sizes of activations over widths, for the coordinate check of muP (arXiv:2203.03466, section D.1).

The size of an activation is the mean of its absolute values. With muP neither the size nor its change by training grows
or shrinks with the width, so the logarithm of each over that of the width has slope 0. Only the logits start smaller in
wider models, slope -1/2, and reach slope 0 during training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import Module

from megatron.distributed.process_group import all_gather_list

Sizes = dict[str, float]
"""Part of the model -> size of its output."""
POSITIONS = 32
"""Number of first positions of each sequence whose changes are measured."""


@dataclass
class ActivationRecorder:
    """Measures one model on one rank, step by step; every step must see the same batch.

    Sizes are those of activations; changes those of their differences from the first step.
    """

    noted: dict[str, list[Tensor]] = field(default_factory=dict)
    """Part -> size at each step."""
    changed: dict[str, list[Tensor]] = field(default_factory=dict)
    """Part -> change at each step."""
    first: dict[str, list[Tensor]] = field(default_factory=dict)
    """Part -> activations of the first step."""
    begun: bool = False
    """True after the first step."""

    @contextmanager
    def on(self, layers: Mapping[int, Module]) -> Iterator[None]:
        """Hooks the layers of a model, by their index, inside the context."""
        handles = [
            module.register_forward_hook(lambda _module, _input, output, name=name: self._note(name, output))
            for name, module in _parts(layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> tuple[Sizes, Sizes]:
        """Returns sizes and changes of the step, means over its passes and all ranks; collective. Starts a step."""
        found = _mean_over_ranks(self.noted), _mean_over_ranks(self.changed)
        self.noted, self.changed, self.begun = {}, {}, True
        return found

    def _note(self, name: str, output: Tensor) -> None:
        """Records the output of one pass: [s, b, features]."""
        output = output.detach().float()
        sizes = self.noted.setdefault(name, [])
        if not self.begun:
            self.first.setdefault(name, []).append(output[:POSITIONS].clone())
        change = output[:POSITIONS] - self.first[name][len(sizes)]
        self.changed.setdefault(name, []).append(change.abs().mean())
        sizes.append(output.abs().mean())


def _mean_over_ranks(noted: Mapping[str, Sequence[Tensor]]) -> Sizes:
    own = {name: (float(sum(sizes)), len(sizes)) for name, sizes in noted.items()}
    everyone = all_gather_list(own)
    return {name: sum(each[name][0] for each in everyone) / sum(each[name][1] for each in everyone) for name in own}


def _parts(layers: Mapping[int, Module]) -> Iterator[tuple[str, Module]]:
    """Yields the measured modules: all layers but the identities, and attention and MLP inside blocks."""
    last = max(layers)
    ends = {0: "embedding", last - 1: "final norm", last: "logits"}
    for index, layer in layers.items():
        if index in ends:
            yield ends[index], layer
        elif index not in (1, last - 2):
            yield f"block {index - 2}", layer
            for inner in ("attention", "mlp"):
                if hasattr(layer, inner):
                    yield f"block {index - 2} {inner}", getattr(layer, inner)


@dataclass(frozen=True)
class Curves:
    """Sizes of one parametrization over widths."""

    widths: tuple[int, ...]
    """Widths of the models."""
    sizes: Mapping[str, tuple[tuple[float, ...], ...]]
    """Part -> by step -> by width."""
    changes: Mapping[str, tuple[tuple[float, ...], ...]]
    """The same of changes, from the second step on."""

    @classmethod
    def of(cls, measured: Mapping[int, Sequence[tuple[Sizes, Sizes]]]) -> Curves:
        """Creates curves from width -> results of an ActivationRecorder by step."""
        widths = tuple(sorted(measured))
        parts, count = list(measured[widths[0]][0][0]), len(measured[widths[0]])

        def by_part(kind: int, first: int) -> dict[str, tuple[tuple[float, ...], ...]]:
            steps = range(first, count)
            return {
                part: tuple(tuple(measured[width][step][kind][part] for width in widths) for step in steps)
                for part in parts
            }

        return cls(widths, by_part(0, 0), by_part(1, 1))

    def slopes(self, *, of_changes: bool = False) -> dict[str, tuple[float, ...]]:
        """Returns part -> at each step, the slope of log(size) over log(width): 0 is flat, 1 grows like the width."""
        curves = self.changes if of_changes else self.sizes
        return {part: tuple(slope(self.widths, sizes) for sizes in by_step) for part, by_step in curves.items()}

    def json(self) -> dict[str, Any]:
        """Returns all numbers."""
        slopes, change_slopes = self.slopes(), self.slopes(of_changes=True)
        return {
            part: {
                "sizes": sizes,
                "slopes": slopes[part],
                "changes": self.changes[part],
                "change_slopes": change_slopes[part],
            }
            for part, sizes in self.sizes.items()
        }


def slope(widths: Sequence[float], sizes: Sequence[float]) -> float:
    """Returns the slope of the least-squares line of log(size) over log(width); NaN if a size is zero or not finite."""
    if not all(0 < size < math.inf for size in sizes):
        return math.nan
    x, y = [math.log(width) for width in widths], [math.log(size) for size in sizes]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - middle_x) ** 2 for a in x)
