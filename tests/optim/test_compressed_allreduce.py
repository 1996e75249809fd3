"""1-bit Adam: the exchange against a float64 computation of all ranks in one process, its bytes, and its layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron.distributed.mesh import Topology
from megatron.distributed.param_attrs import mark_sharded
from megatron.optim.builder_args import OptimizerArgs
from megatron.optim.onebit import OnebitAdam, build
from tests.multi_rank import run_distributed

SHAPES = [(6, 40), (24,), (3, 7)]
FREEZE, STEPS, LR, BETAS, EPS = 4, 12, 1e-2, (0.9, 0.95), 1e-6


def start(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def gradient(step: int, worker: int, index: int) -> Tensor:
    """One worker's gradient; the last row of the first tensor never gets one."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * worker + index)
    drawn = torch.randn(SHAPES[index], generator=generator)
    if index == 0:
        drawn[-1] = 0
    return drawn


def compress(values: Tensor, live: Tensor) -> Tensor:
    """Signs times the mean absolute value of the row's live elements."""
    rows = values if values.dim() > 1 else values.unsqueeze(0)
    mask = live.view(rows.shape)
    scale = (rows.abs() * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    signs = torch.where(rows >= 0, 1.0, -1.0).to(values.dtype)
    return (signs * scale * mask).view(values.shape)


def reference(workers: int) -> list[Tensor]:
    """Algorithm 1 with all workers in one process, in float64."""
    weights = start(torch.float64)
    first = [torch.zeros_like(weight) for weight in weights]
    second = [torch.zeros_like(weight) for weight in weights]
    errors = [[torch.zeros_like(weight) for weight in weights] for _ in range(workers)]
    server = [torch.zeros_like(weight) for weight in weights]
    for step in range(1, STEPS + 1):
        for index, weight in enumerate(weights):
            own = [gradient(step, worker, index).double() for worker in range(workers)]
            if step <= FREEZE:
                mean = torch.stack(own).mean(0)
                first[index] = BETAS[0] * first[index] + (1 - BETAS[0]) * mean
                second[index] = BETAS[1] * second[index] + (1 - BETAS[1]) * mean**2
            else:
                live = second[index] > 0
                sent = []
                for worker in range(workers):
                    target = BETAS[0] * first[index] + (1 - BETAS[0]) * own[worker] + errors[worker][index]
                    target = target * live
                    sent.append(compress(target, live))
                    errors[worker][index] = target - sent[-1]
                mean = torch.stack(sent).mean(0) + server[index]
                first[index] = compress(mean, live)
                server[index] = (mean - first[index]) * live
            c1, c2 = 1 - BETAS[0] ** step, 1 - BETAS[1] ** min(step, FREEZE)
            weight *= 1 - LR * 0.1
            weight -= LR * (first[index] / c1) / ((second[index] / c2).sqrt() + EPS)
    return weights


def optimizer_of(params: list[Parameter], topology: Topology) -> OnebitAdam:
    settings = {"betas": BETAS, "eps": EPS, "freeze_step": FREEZE}
    made = build([{"params": params, "weight_decay": 0.1}], OptimizerArgs(LR, topology, settings))
    assert isinstance(made, OnebitAdam)
    return made


def worker(rank: int, world_size: int) -> tuple[list[Tensor], float, float, float]:
    """One rank's weights; bytes that its calls of torch.distributed carried; what the optimizer counted."""
    topology = Topology.build(pipe=1, model=1, rank=rank, world_size=world_size)
    params = [Parameter(weight) for weight in start()]
    optimizer = optimizer_of(params, topology)
    frozen: list[int] = []
    optimizer.on_freeze = lambda: frozen.append(1)
    carried = 0.0
    for step in range(1, STEPS + 1):
        for index, parameter in enumerate(params):
            parameter.grad = gradient(step, rank, index)
            if step <= FREEZE:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size
        before = counting(optimizer.step)
        carried += before if step > FREEZE else 0.0
    assert frozen == [1]
    return [p.detach() for p in params], carried, optimizer.comm_bytes.sent, optimizer.comm_bytes.uncompressed


def counting(action: Any) -> float:
    """Bytes that a rank sends in the collectives of an action: a buffer goes to every other rank, or around a ring."""
    total = 0.0
    plain = {name: getattr(dist, name) for name in ("all_to_all_single", "all_gather", "all_reduce")}
    world = dist.get_world_size()

    def count(name: str) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal total
            if name == "all_to_all_single":
                total += args[1].nbytes * (world - 1) / world
            elif name == "all_gather":
                total += args[1].nbytes * (world - 1)
            else:
                total += args[0].nbytes * 2 * (world - 1) / world
            return plain[name](*args, **more)

        return call

    try:
        for name in plain:
            setattr(dist, name, count(name))
        action()
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
    return total


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_number_of_workers_follows_the_algorithm(workers: int) -> None:
    for weights, carried, sent, _ in run_distributed(worker, workers):
        for got, expected in zip(weights, reference(workers), strict=True):
            assert got == pytest.approx(expected.float(), abs=1e-4)
        assert sent == pytest.approx(carried)


def large(rank: int, world_size: int) -> tuple[float, float]:
    topology = Topology.build(pipe=1, model=1, rank=rank, world_size=world_size)
    params = [Parameter(torch.randn(512, 1024)), Parameter(torch.randn(1024))]
    optimizer = optimizer_of(params, topology)
    for _ in range(FREEZE + 1):
        for parameter in params:
            parameter.grad = torch.randn_like(parameter)
        sent = counting(optimizer.step)
    return sent, optimizer.comm_bytes.uncompressed


def test_a_compressed_step_sends_a_thirtieth() -> None:
    """Of what a ring all-reduce of fp32 gradients sends, for rows of 1,024: 1 bit of 32, and magnitudes."""
    for sent, uncompressed in run_distributed(large, 2):
        assert uncompressed / sent > 27


def cut(rank: int, world_size: int) -> list[Tensor]:
    """Two tensor-parallel ranks: the first tensor cut by columns, the second cut, the third on both."""
    topology = Topology.build(pipe=1, model=2, rank=rank, world_size=world_size)
    full = start()
    params = [Parameter(full[0].chunk(2, 1)[rank].clone()), Parameter(full[1].chunk(2)[rank].clone())]
    mark_sharded(params[0], 1)
    mark_sharded(params[1], 0)
    params.append(Parameter(full[2]))
    optimizer = optimizer_of(params, topology)
    for step in range(1, STEPS + 1):
        grads = [gradient(step, 0, index) for index in range(3)]
        params[0].grad = grads[0].chunk(2, 1)[rank].clone()
        params[1].grad = grads[1].chunk(2)[rank].clone()
        params[2].grad = grads[2]
        optimizer.step()
    return [parameter.detach() for parameter in params]


def test_tensor_parallel_ranks_compress_what_one_would() -> None:
    first, second = run_distributed(cut, 2)
    expected = reference(1)
    assert torch.cat((first[0], second[0]), 1) == pytest.approx(expected[0].float(), abs=1e-4)
    assert torch.cat((first[1], second[1])) == pytest.approx(expected[1].float(), abs=1e-4)
    assert torch.equal(first[2], second[2])
    assert first[2] == pytest.approx(expected[2].float(), abs=1e-4)
