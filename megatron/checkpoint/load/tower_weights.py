"""The weights of one encoder as those of two, each of which begins with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron.checkpoint.format.weight_shards import StoredWeights
from megatron.param_table import ModelDims


@dataclass(frozen=True)
class BothTowers:
    """Weights of one encoder under the keys of both."""

    weights: StoredWeights
    """Those that are stored."""
    layers: int
    """Layers of one encoder."""

    @property
    def directory(self) -> Path:
        """The checkpoint's folder."""
        return self.weights.directory

    @property
    def model_size(self) -> int:
        """Tensor-parallel degree of the run that wrote them."""
        return self.weights.model_size

    def keys(self) -> set[str]:
        """Returns the keys of all weights."""
        stored = self.weights.keys()
        return stored | {_shifted(key, self.layers) for key in stored}

    def shards(self, key: str) -> list[Tensor]:
        """Returns the tensor as every tensor-parallel rank wrote it, in rank order."""
        return self.weights.shards(key if _layer(key) < self.layers else _shifted(key, -self.layers))


def for_towers(weights: StoredWeights, dims: ModelDims) -> StoredWeights:
    """Returns stored weights as those of a model: of one encoder as those of both, where the model has two.

    Args:
        weights: those that are stored.
        dims: of the model.
    """
    if dims.towers < 2 or any(_layer(key) >= dims.tower_layers for key in weights.keys()):  # noqa: SIM118
        return weights
    return BothTowers(weights, dims.tower_layers)


def _layer(key: str) -> int:
    return int(key.partition(".")[0])


def _shifted(key: str, layers: int) -> str:
    layer, _, name = key.partition(".")
    return f"{int(layer) + layers}.{name}"
