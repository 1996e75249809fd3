"""States and last positions that pass from rank to rank, and their gradients, against one process in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.distributed.context_parallel.states import StatePassing
from megatron.distributed.mesh import Axis, Topology
from megatron.distributed.process_group import barrier
from tests.multi_rank import run_cases

LENGTH, WIDTH, BACK = 12, 3, 2
SIZES = (2, 3)


def numbers() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [b, s, width], a decay [width], and the gradient of the results."""
    generator = torch.Generator().manual_seed(4)
    x, grad = (torch.randn(2, LENGTH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, torch.rand(WIDTH, generator=generator, dtype=torch.float64), grad


def block(x: Tensor, decay: Tensor, before: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A difference to the position BACK before, and a recurrence; returns its results and last state."""
    moved = x - torch.cat((before, x), dim=1)[:, : x.shape[1]]
    results = []
    for t in range(x.shape[1]):
        state = decay * state + moved[:, t]
        results.append(torch.sin(state))
    return torch.stack(results, dim=1), state


def expected() -> tuple[Tensor, Tensor, Tensor]:
    x, decay, grad = numbers()
    x.requires_grad_()
    decay.requires_grad_()
    hidden = x
    for _ in range(2):
        hidden, _ = block(hidden, decay, torch.zeros(2, BACK, WIDTH), torch.zeros(2, WIDTH, dtype=torch.float64))
    hidden.backward(grad)
    assert x.grad is not None
    assert decay.grad is not None
    return hidden.detach(), x.grad, decay.grad


def shared(rank: int, size: int, recompute: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Two blocks on this rank's shard, as they are or recomputed in the backward pass."""
    passing = StatePassing(Topology.build(pipe=1, model=1, context=size, rank=rank, world_size=size).context)
    x, decay, grad = numbers()
    x = x.chunk(size, 1)[rank].clone().requires_grad_()
    decay.requires_grad_()

    def mixed(hidden: Tensor) -> Tensor:
        before = passing.positions_before(hidden, BACK)
        state = passing.receive(hidden, 2, WIDTH, dtype=torch.float64)
        y, last = block(hidden, decay, before, state)
        return passing.send(y, last) * 1.0

    hidden = x
    for _ in range(2):
        hidden = torch.utils.checkpoint.checkpoint(mixed, hidden, use_reentrant=False) if recompute else mixed(hidden)
    hidden.backward(grad.chunk(size, 1)[rank])
    barrier()
    return hidden.detach(), x.grad, decay.grad


@pytest.fixture(scope="module", params=SIZES)
def world(request: pytest.FixtureRequest) -> tuple[int, dict[Any, list[Any]]]:
    size: int = request.param
    return size, run_cases({recompute: (shared, recompute) for recompute in (False, True)}, size, timeout=25)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_ranks_go_on_from_each_other(recompute: bool, world: tuple[int, dict[Any, list[Any]]]) -> None:
    """Gradients of a shard are those of its positions; those of a weight are a sum over ranks."""
    _, found = world
    results, of_x, of_decay = zip(*found[recompute], strict=True)
    for got, value in zip((torch.cat(results, 1), torch.cat(of_x, 1), sum(of_decay)), expected(), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12)


def test_a_shard_too_short_is_refused() -> None:
    passing = StatePassing(Axis("context", 2, 0, (0, 1)))
    with pytest.raises(ValueError, match="reads 3 positions of the shard before, which has 2"):
        passing.positions_before(torch.zeros(1, 2, WIDTH), 3)
