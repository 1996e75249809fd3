"""Muon's iterations by Triton in a whole engine: in fp32, and at ZeRO 1 in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.config import Resources, resolve
from megatron.engine.builder import build_training_engine, init_topology
from tests.end_to_end import engines
from tests.multi_rank import run_distributed

STEPS, ITERATIONS, PRODUCTS = 2, 5, 2
SMALL = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "norm": "layernorm", "activation": "gelu"}
MATRICES = 4  # queries, keys and values; attention's output; both of the MLP
LAYOUTS: dict[str, dict[str, Any]] = {
    "fp32": {"optimizer": {"type": "muon", "params": {"lr": 1e-2}}},
    "bfloat16": {
        "optimizer": {"type": "muon", "params": {"lr": 1e-2, "adjust_lr_fn": "original"}},
        "precision": "bfloat16",
        "zero_optimization": {"stage": 1},
    },
}
Trace = dict[str, tuple[list[float], list[float], int]]


def trained(rank: int, world_size: int) -> dict[str, Trace]:
    """Losses, a weight after training and the number of symmetric products, for each precision and kind of kernels."""
    from megatron.kernels.triton import newton_schulz

    counted, own = [], newton_schulz.scaled_symmetric

    def count(*args: Any) -> torch.Tensor:
        counted.append(args)
        return own(*args)

    newton_schulz.scaled_symmetric = count
    topology = None
    found: dict[str, Trace] = {}
    for name, layout in LAYOUTS.items():
        for kernels in ("torch", "triton"):
            keys = {**engines.BASE, **SMALL, **layout, "kernels": kernels}
            config = resolve([], keys, Resources(world_size)).config
            topology = topology or init_topology(config)
            engine = build_training_engine(config, topology, padded_vocab_size=engines.VOCABULARY)
            counted.clear()
            batches = engines.batches(config, topology)
            losses = [float(engine.train_step(iter(batches), 1e-2).loss) for _ in range(STEPS)]
            matrix = next(one for one in engine.parameters.values() if one.dim() == 2 and one.shape[0] == 48)
            found.setdefault(name, {})[kernels] = (losses, matrix.detach().float().flatten().tolist(), len(counted))
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Trace]:
    return run_distributed(trained, 1, timeout=300)[0]


@pytest.mark.parametrize("precision", LAYOUTS)
def test_the_engine_s_muon_iterates_in_triton(precision: str, found: dict[str, Trace]) -> None:
    losses, matrix, products = found[precision]["triton"]
    torch_losses, torch_matrix, torch_products = found[precision]["torch"]
    assert torch_products == 0
    assert products == STEPS * ITERATIONS * PRODUCTS * MATRICES
    assert losses == pytest.approx(torch_losses, rel=1e-2)
    assert losses[1] < losses[0]
    difference = torch.tensor(matrix) - torch.tensor(torch_matrix)
    assert difference.abs().max() < 2e-3  # an update of 1e-2 times a fraction of a semi-orthogonal matrix
    assert difference.any()
