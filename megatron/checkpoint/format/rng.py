"""The random generators of a rank, as tensors and plain values that load without running code."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

from megatron.distributed.rng_tracker import TensorParallelRNG


def capture(sharded: TensorParallelRNG | None = None) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators (CPU and current GPU), and of the one for cut tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(numpy.asarray(keys).astype(numpy.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if sharded is not None:
        state["sharded"] = sharded.state_dict()
    return state


def restore(state: dict[str, Any], sharded: TensorParallelRNG | None = None) -> None:
    """Puts the generators back where `capture` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype(numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].clone())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].clone())
    if "sharded" in state and sharded is not None:
        sharded.load_state_dict(state["sharded"])
