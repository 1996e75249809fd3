"""Dropout on a residual stream that is cut along the sequence: every rank draws its own mask, at the right rate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.distributed.mesh import Topology
from megatron.distributed.rng_tracker import TensorParallelRNG
from tests.model.sections import build
from tests.multi_rank import run_cases

RATE = 0.3


def masks(rank: int, size: int, sequence: bool) -> tuple[Tensor, Tensor]:
    """Which elements the embedding's dropout and a block's leave, and the default generator's next draw."""
    torch.manual_seed(1)
    topology = Topology.build(pipe=1, model=size, rank=rank, world_size=size, sequence_parallel=sequence)
    model = build(topology, hidden_dropout=RATE)
    block = model.sequential[2]
    ones = torch.ones(4096 // (size if sequence else 1), 1, 16)
    retained = block.add(torch.zeros_like(ones), ones)
    return retained, torch.rand(4)


@pytest.fixture(scope="module")
def drawn() -> dict[bool, list[tuple[Tensor, Tensor]]]:
    return run_cases({sequence: (masks, sequence) for sequence in (False, True)}, 2)


@pytest.mark.parametrize("sequence", [False, True])
def test_masks_and_their_rate(sequence: bool, drawn: dict[bool, list[tuple[Tensor, Tensor]]]) -> None:
    first, second = drawn[sequence]
    assert torch.equal(first[0], second[0]) is not sequence
    assert torch.equal(first[1], second[1])  # what comes after agrees on all ranks in either case
    for retained, _ in (first, second):
        share = float((retained == 0).double().mean())
        std = (RATE * (1 - RATE) / retained.numel()) ** 0.5
        assert abs(share - RATE) < 5 * std
        assert retained.max() == pytest.approx(1 / (1 - RATE))


def test_ranks_differ_by_their_number() -> None:
    draws = []
    for rank in range(8):
        with TensorParallelRNG(seed=1, rank=rank).fork():
            draws.append(tuple(torch.rand(4).tolist()))
    assert len(set(draws)) == 8
