"""Fingerprints of a run: checksum and norm of every layer's weights, activations and gradients at some steps.

They locate the first difference of two runs that should be equal. With `fingerprint_interval` each rank writes its
records in order to `<log_dir>/fingerprints/rank_<rank>.jsonl`, and tools/compare_runs.py finds the first difference.
The checksum compares bits, the norm gives the size of a difference.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron.atomic import open_lines

FOLDER = "fingerprints"
WEIGHTS, ACTIVATION, GRADIENT = "weights", "activation", "gradient"


class Fingerprints:
    """Writes the fingerprints of one rank.

    Args:
        log_dir: Run directory.
        rank: Global rank.
        interval: Steps between fingerprints.
        layers: Index of a layer -> module.
        parameters: Key -> parameter.
    """

    def __init__(
        self, log_dir: Path, rank: int, interval: int, layers: Mapping[int, Module], parameters: Mapping[str, Parameter]
    ) -> None:
        self._path = log_dir / FOLDER / f"rank_{rank:05d}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._interval = interval
        self._layers = layers
        self._parameters = parameters

    @contextmanager
    def recording(self, iteration: int) -> Iterator[None]:
        """Records the step of this iteration if the interval divides it."""
        if iteration % self._interval:
            yield
            return
        with open_lines(self._path) as file:
            recorder = _IterationRecorder(file, iteration)
            for key, parameter in self._parameters.items():
                recorder.add(WEIGHTS, key, getattr(parameter, "ds_tensor", parameter))
            handles = [layer.register_forward_hook(recorder.hook(index)) for index, layer in self._layers.items()]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()


class _IterationRecorder:
    """The records of one iteration."""

    def __init__(self, file: TextIO, iteration: int) -> None:
        self._file = file
        self._iteration = iteration
        self._passes: dict[int, int] = {}

    def hook(self, index: int) -> Any:
        """Returns a forward hook for the layer of that index."""

        def record(module: Module, inputs: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # recomputation in the backward pass
            number = self._passes.get(index, 0)
            self._passes[index] = number + 1
            for tensor in output if isinstance(output, tuple) else (output,):
                if not tensor.is_floating_point():
                    continue
                self.add(ACTIVATION, str(index), tensor, number)
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self.add(GRADIENT, str(index), gradient, number))

        return record

    def add(self, quantity: str, layer: str, tensor: Tensor, micro_batch: int = 0) -> None:
        """Writes one record.

        Args:
            quantity: weights, activation or gradient.
            layer: layer index, or the key of a parameter.
            tensor: its values.
            micro_batch: number of the micro batch.
        """
        values = tensor.detach().contiguous().cpu()
        record = {
            "iteration": self._iteration,
            "micro_batch": micro_batch,
            "what": quantity,
            "layer": layer,
            "bits": zlib.crc32(values.flatten().view(torch.uint8).numpy().data),
            "norm": float(torch.linalg.vector_norm(values, dtype=torch.float64)),
        }
        self._file.write(json.dumps(record) + "\n")


def read_fingerprints(log_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """Reads rank -> its records, in order; empty where there are none."""
    found = {}
    for path in sorted((log_dir / FOLDER).glob("rank_*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        found[int(path.stem.removeprefix("rank_"))] = [json.loads(line) for line in lines]
    return found
