"""Weights of two encoders, each stored as a model of its own, as those of one model; one may stand for both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron.checkpoint.format.weight_shards import StoredWeights
from megatron.param_table import ModelDims


@dataclass(frozen=True)
class BothTowers:
    """Weights of two encoders under the keys of a model of both."""

    queries: StoredWeights
    """Of the encoder of queries."""
    passages: StoredWeights
    """Of the encoder of passages, under keys of their own; may be the same."""
    layers: int
    """Layers of one encoder."""

    @property
    def directory(self) -> Path:
        """The folder of the encoder of queries."""
        return self.queries.directory

    @property
    def model_size(self) -> int:
        """Tensor-parallel degree of the run that wrote them."""
        return self.queries.model_size

    def keys(self) -> set[str]:
        """Returns the keys of all weights."""
        return self.queries.keys() | {_shifted(key, self.layers) for key in self.passages.keys()}  # noqa: SIM118

    def shards(self, key: str) -> list[Tensor]:
        """Returns the tensor as every tensor-parallel rank wrote it, in rank order."""
        if _layer(key) < self.layers:
            return self.queries.shards(key)
        return self.passages.shards(_shifted(key, -self.layers))


def for_towers(weights: StoredWeights, dims: ModelDims) -> StoredWeights:
    """Returns stored weights as those of a model: of one encoder as those of both, where the model has two.

    Args:
        weights: those that are stored.
        dims: of the model.
    """
    if dims.towers < 2 or any(_layer(key) >= dims.tower_layers for key in weights.keys()):  # noqa: SIM118
        return weights
    return BothTowers(weights, weights, dims.tower_layers)


def _layer(key: str) -> int:
    return int(key.partition(".")[0])


def _shifted(key: str, layers: int) -> str:
    layer, _, name = key.partition(".")
    return f"{int(layer) + layers}.{name}"
