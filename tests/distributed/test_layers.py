"""Tensor-parallel layers against the dense layer's autograd, rank by rank, and the marks they leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.distributed.collectives import copy_to, gather_from, reduce_from, scatter_to
from megatron.distributed.mesh import Axis, Topology
from megatron.distributed.param_attrs import is_sharded, no_weight_decay, shard_dim, shard_sections
from megatron.distributed.param_init import ParamFactory
from megatron.distributed.rng_tracker import TensorParallelRNG
from megatron.distributed.tensor_parallel.embedding import VocabParallelEmbedding
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.distributed.tensor_parallel.sequence_parallel import Regather
from megatron.kernels.linear import onednn_linear, plain_linear
from megatron.param_table.tensor import section_slices
from tests.multi_rank import run_cases

WIDTH, OUT, SECTIONS, TOKENS = 24, 64, (32, 16, 16), (5, 2)


def draw(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(generator=generator)


def model_axis(rank: int, world_size: int) -> Axis:
    return Topology.build(pipe=1, model=world_size, rank=rank, world_size=world_size).model


def source(axis: Axis) -> ParamFactory:
    return ParamFactory(seed=3, layer=2, axis=axis).of("part")


def rows(tensor: Tensor, sections: tuple[int, ...], rank: int, size: int) -> Tensor:
    return torch.cat([tensor[start:stop] for start, stop in section_slices(sections, rank, size)])


def fixed(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def columns(rank: int, size: int, kernel: Any) -> dict[str, Tensor]:
    """A column-parallel layer: its output slice and the gradients, for an output gradient that is cut the same way."""
    layer = ColumnParallelLinear(
        WIDTH, OUT, source(model_axis(rank, size)), init_fn=draw, bias=True, sections=SECTIONS, kernel=kernel
    )
    layer.bias.data += rows(fixed(OUT, seed=4), SECTIONS, rank, size)
    x = fixed(*TOKENS, WIDTH, seed=5).requires_grad_()
    y = layer(x)
    y.backward(rows(fixed(OUT, *TOKENS, seed=6), SECTIONS, rank, size).permute(1, 2, 0))
    return {"y": y.detach(), "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}


def region(rank: int, size: int) -> dict[str, Any]:
    """A column-parallel and a row-parallel layer with sequence parallelism, and what is left of the gathered input."""
    axis = Topology.build(pipe=1, model=size, rank=rank, world_size=size, sequence_parallel=True).model
    regather = Regather()
    layers = [
        ColumnParallelLinear(WIDTH, OUT, source(axis), init_fn=draw, bias=False),
        ColumnParallelLinear(WIDTH, OUT, source(axis), init_fn=draw, bias=False),
    ]
    end = RowParallelLinear(OUT, WIDTH, source(axis), init_fn=draw, bias=False)
    x = fixed(8, 2, WIDTH, seed=5).chunk(size)[rank].requires_grad_()
    y = end(sum(layer(x, regather) for layer in layers), regather)
    y.backward(fixed(8, 2, WIDTH, seed=6).chunk(size)[rank])
    left = [part.numel() for part in regather.full]
    return {"left": left, "weights": [layer.weight.grad for layer in layers], "x": x.grad}


SIZES, KERNELS = (2, 4), (plain_linear, onednn_linear)
Worlds = dict[int, dict[Any, list[Any]]]
"""Ranks -> function and kernel -> what each rank computed."""


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    cases = {(layer, kernel): (layer, kernel) for layer in (columns, row_wise) for kernel in KERNELS}
    return {size: run_cases({**cases, embed: (embed,), pairs: (pairs,), region: (region,)}, size) for size in SIZES}


def dense_source(name: str, *shape: int) -> Tensor:
    """What the layers draw, whole."""
    return source(Topology.single().model).replicated(name, shape, draw).detach()


@pytest.mark.parametrize("size", SIZES)
def test_a_region_of_two_layers_equals_dense_ones_and_forgets_their_input(size: int, worlds: Worlds) -> None:
    weights = [dense_source("weight", OUT, WIDTH).requires_grad_() for _ in range(2)]
    x = fixed(8, 2, WIDTH, seed=5).requires_grad_()
    y = F.linear(sum(F.linear(x, weight) for weight in weights), dense_source("weight", WIDTH, OUT))
    y.backward(fixed(8, 2, WIDTH, seed=6))
    for rank, got in enumerate(worlds[size][region]):
        assert got["left"] == [0]
        torch.testing.assert_close(got["x"], x.grad.chunk(size)[rank], rtol=1e-4, atol=1e-4)
        for found, weight in zip(got["weights"], weights, strict=True):
            torch.testing.assert_close(found, weight.grad.chunk(size)[rank], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_column_parallel_equals_dense(size: int, kernel: Any, worlds: Worlds) -> None:
    weight = dense_source("weight", OUT, WIDTH).requires_grad_()
    bias, x = fixed(OUT, seed=4).requires_grad_(), fixed(*TOKENS, WIDTH, seed=5).requires_grad_()
    y = F.linear(x, weight, bias)
    y.backward(fixed(OUT, *TOKENS, seed=6).permute(1, 2, 0))
    for rank, got in enumerate(worlds[size][columns, kernel]):
        expected_y = rows(y.detach().permute(2, 0, 1), SECTIONS, rank, size).permute(1, 2, 0)
        torch.testing.assert_close(got["y"], expected_y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["x"], x.grad, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(got["weight"], rows(weight.grad, SECTIONS, rank, size), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["bias"], rows(bias.grad, SECTIONS, rank, size), rtol=1e-5, atol=1e-5)


def row_wise(rank: int, size: int, kernel: Any) -> dict[str, Tensor]:
    layer = RowParallelLinear(WIDTH, OUT, source(model_axis(rank, size)), init_fn=draw, bias=True, kernel=kernel)
    layer.bias.data += fixed(OUT, seed=4)
    x = fixed(*TOKENS, WIDTH, seed=5).chunk(size, -1)[rank].contiguous().requires_grad_()
    y = layer(x)
    y.backward(fixed(*TOKENS, OUT, seed=6))
    in_steps = layer.add_bias(reduce_from(layer.partial(x), layer.axis))
    assert torch.allclose(in_steps, y, rtol=1e-6, atol=1e-6)
    return {"y": y.detach(), "x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_row_parallel_equals_dense_and_adds_its_bias_once(size: int, kernel: Any, worlds: Worlds) -> None:
    weight = dense_source("weight", OUT, WIDTH).requires_grad_()
    bias, x = fixed(OUT, seed=4).requires_grad_(), fixed(*TOKENS, WIDTH, seed=5).requires_grad_()
    y = F.linear(x, weight, bias)
    y.backward(fixed(*TOKENS, OUT, seed=6))
    for rank, got in enumerate(worlds[size][row_wise, kernel]):
        torch.testing.assert_close(got["y"], y.detach(), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(got["x"], x.grad.chunk(size, -1)[rank], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["weight"], weight.grad.chunk(size, 1)[rank], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["bias"], bias.grad, rtol=1e-5, atol=1e-5)


def embed(rank: int, size: int) -> dict[str, Tensor]:
    layer = VocabParallelEmbedding(OUT, WIDTH, source(model_axis(rank, size)), init_fn=draw)
    ids = torch.arange(OUT).view(4, 16)
    vectors = layer(ids)
    logits = layer(vectors, as_output_layer=True)
    logits.backward(fixed(4, 16, OUT, seed=7).chunk(size, -1)[rank].contiguous())
    return {"vectors": vectors.detach(), "logits": logits.detach(), "weight": layer.weight.grad}


@pytest.mark.parametrize("size", SIZES)
def test_tied_embedding_equals_dense(size: int, worlds: Worlds) -> None:
    weight = dense_source("weight", OUT, WIDTH).requires_grad_()
    vectors = F.embedding(torch.arange(OUT).view(4, 16), weight)
    logits = F.linear(vectors, weight)
    logits.backward(fixed(4, 16, OUT, seed=7))
    for rank, got in enumerate(worlds[size][embed]):
        torch.testing.assert_close(got["vectors"], vectors.detach(), rtol=0, atol=0)
        torch.testing.assert_close(got["logits"], logits.detach().chunk(size, -1)[rank], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["weight"], weight.grad.chunk(size)[rank], rtol=1e-5, atol=1e-4)


def pairs(rank: int, size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Output and input gradient of each collective pair; the input is rank + 1, the output gradient 10 * (rank + 1)."""
    axis = model_axis(rank, size)
    results = {}
    for name, operation in (
        ("copy", copy_to),
        ("reduce", reduce_from),
        ("gather", gather_from),
        ("scatter", scatter_to),
    ):
        x = torch.full((2, 4), rank + 1.0, requires_grad=True)
        y = operation(x, axis)
        y.backward(10 * (rank + 1) * torch.arange(1.0, y.numel() + 1).view(y.shape))
        results[name] = (y.detach(), x.grad)
    return results


def test_collectives_and_their_gradients(worlds: Worlds) -> None:
    for rank, got in enumerate(worlds[2][pairs]):
        mine, ramp = rank + 1.0, torch.arange(1.0, 9).view(2, 4)
        assert torch.equal(got["copy"][0], torch.full((2, 4), mine))
        assert torch.equal(got["copy"][1], 30 * ramp)
        assert torch.equal(got["reduce"][0], torch.full((2, 4), 3.0))
        assert torch.equal(got["reduce"][1], 10 * mine * ramp)
        assert torch.equal(got["gather"][0], torch.tensor([1.0, 1, 1, 1, 2, 2, 2, 2]).expand(2, 8))
        wide = torch.arange(1.0, 17).view(2, 8)
        assert torch.equal(got["gather"][1], 10 * mine * wide[:, 4 * rank : 4 * rank + 4])
        assert torch.equal(got["scatter"][0], torch.full((2, 2), mine))
        narrow = torch.arange(1.0, 5).view(2, 2)
        assert torch.equal(got["scatter"][1], torch.cat((10 * narrow, 20 * narrow), dim=1))


def test_marks() -> None:
    made = ColumnParallelLinear(WIDTH, OUT, source(Topology.single().model), init_fn=draw, bias=True, sections=SECTIONS)
    row = RowParallelLinear(WIDTH, OUT, source(Topology.single().model), init_fn=draw, bias=True)
    assert (shard_dim(made.weight), shard_dim(made.bias), shard_dim(row.weight), shard_dim(row.bias)) == (0, 0, 1, None)
    assert shard_sections(made.weight) == SECTIONS
    assert [no_weight_decay(p) for p in (made.weight, made.bias, row.weight, row.bias)] == [False, True, False, True]
    assert made.weight.model_parallel
    assert not is_sharded(row.bias)
    assert not hasattr(row.bias, "model_parallel")


def test_an_uneven_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="64 rows do not divide by 3"):
        ColumnParallelLinear(WIDTH, OUT, source(Axis("model", 3, 0, (0, 1, 2))), init_fn=draw, bias=False)


def test_sharded_draws_differ_by_rank_and_leave_the_shared_ones_alone() -> None:
    torch.manual_seed(1)
    shared = torch.rand(8)
    draws = []
    for rank in (0, 1):
        random = TensorParallelRNG(seed=5, rank=rank)
        torch.manual_seed(1)
        with random.fork():
            first = torch.rand(8)
        saved = random.state_dict()
        assert torch.equal(torch.rand(8), shared)
        with random.fork():
            second = torch.rand(8)
        random.load_state_dict(saved)
        with random.fork():
            assert torch.equal(torch.rand(8), second)
        draws += [first, second, shared]
    assert len({tuple(drawn.tolist()) for drawn in draws}) == 5
