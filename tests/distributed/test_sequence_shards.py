"""Sequence and context parallelism against dense autograd in float64, rank by rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.distributed.context_parallel.sequence_shards import SequenceShards
from megatron.distributed.context_parallel.ulysses import all_to_all_heads_to_seq, all_to_all_seq_to_heads
from megatron.distributed.mesh import Axis, Topology
from megatron.distributed.param_init import ParamFactory
from megatron.distributed.partial_grads import mark_partial_grad
from megatron.distributed.tensor_parallel.embedding import VocabParallelEmbedding
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.distributed.tensor_parallel.sequence_parallel import (
    all_gather_first,
    reduce_from_tp,
    reduce_scatter_first,
)
from megatron.kernels.attention import plain_attention
from megatron.model.norms.layernorm import LayerNorm
from tests.multi_rank import run_cases

LENGTH, BATCH, WIDTH, INNER = 8, 3, 12, 16
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def fixed(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(generator=generator)


def model_axis(rank: int, size: int) -> Axis:
    return Topology.build(pipe=1, model=size, rank=rank, world_size=size, sequence_parallel=True).model


def source(axis: Axis) -> ParamFactory:
    return ParamFactory(seed=3, layer=2, axis=axis, dtype=torch.float64)


def part(x: Tensor, rank: int, size: int) -> Tensor:
    return x.chunk(size)[rank].clone().requires_grad_()


def mlp(rank: int, size: int) -> dict[str, Tensor]:
    """Norm -> column -> row, on this rank's part of the sequence."""
    axis = model_axis(rank, size)
    norm = LayerNorm(WIDTH, 1e-5, bias=True).double()
    for parameter in norm.parameters():
        mark_partial_grad(parameter, axis)
    column = ColumnParallelLinear(WIDTH, INNER, source(axis).of("column"), init_fn=draw, bias=True)
    row = RowParallelLinear(INNER, WIDTH, source(axis).of("row"), init_fn=draw, bias=True)
    x = part(fixed(LENGTH, BATCH, WIDTH, seed=5), rank, size)
    y = row(torch.tanh(column(norm(x))))
    y.backward(part(fixed(LENGTH, BATCH, WIDTH, seed=6), rank, size))
    names = {**{f"norm.{n}": p for n, p in norm.named_parameters()}, "row.weight": row.weight, "row.bias": row.bias}
    names |= {"column.weight": column.weight, "column.bias": column.bias}
    return {"y": y.detach(), "x": x.grad, **{name: parameter.grad for name, parameter in names.items()}}


SIZES = (2, 4)
Worlds = dict[int, dict[Any, list[Any]]]
"""Ranks -> function -> what each rank computed."""


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    functions = (mlp, embed, adjoints, exchanged, low_precision)
    return {size: run_cases({function: (function,) for function in functions}, size) for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
def test_layers_equal_dense_ones(size: int, worlds: Worlds) -> None:
    """Outputs and input gradients are parts of the dense ones; replicated parameters have the whole gradient."""
    complete = source(Topology.single().model)
    column = ColumnParallelLinear(WIDTH, INNER, complete.of("column"), init_fn=draw, bias=True)
    row = RowParallelLinear(INNER, WIDTH, complete.of("row"), init_fn=draw, bias=True)
    norm = LayerNorm(WIDTH, 1e-5, bias=True).double()
    x = fixed(LENGTH, BATCH, WIDTH, seed=5).requires_grad_()
    hidden = torch.tanh(F.linear(F.layer_norm(x, (WIDTH,), norm.weight, norm.bias), column.weight, column.bias))
    y = F.linear(hidden, row.weight, row.bias)
    y.backward(fixed(LENGTH, BATCH, WIDTH, seed=6))
    for rank, got in enumerate(worlds[size][mlp]):
        expected = {
            "y": y.detach().chunk(size)[rank],
            "x": x.grad.chunk(size)[rank],
            "norm.weight": norm.weight.grad,
            "norm.bias": norm.bias.grad,
            "column.weight": column.weight.grad.chunk(size)[rank],
            "column.bias": column.bias.grad.chunk(size)[rank],
            "row.weight": row.weight.grad.chunk(size, 1)[rank],
            "row.bias": row.bias.grad,
        }
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, **EXACT, msg=lambda text, n=name: f"{n}: {text}")


def embed(rank: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    layer = VocabParallelEmbedding(16, WIDTH, source(model_axis(rank, size)), init_fn=draw)
    vectors = layer(torch.arange(LENGTH * 2).view(LENGTH, 2))
    logits = layer(vectors, as_output_layer=True)
    logits.backward(fixed(LENGTH, 2, 16, seed=7).chunk(size, -1)[rank])
    return vectors.detach(), logits.detach(), layer.weight.grad


@pytest.mark.parametrize("size", SIZES)
def test_tied_embedding_equals_dense(size: int, worlds: Worlds) -> None:
    weight = VocabParallelEmbedding(16, WIDTH, source(Topology.single().model), init_fn=draw).weight
    vectors = F.embedding(torch.arange(LENGTH * 2).view(LENGTH, 2), weight)
    logits = F.linear(vectors, weight)
    logits.backward(fixed(LENGTH, 2, 16, seed=7))
    for rank, (got, scores, gradient) in enumerate(worlds[size][embed]):
        torch.testing.assert_close(got, vectors.detach().chunk(size)[rank], **EXACT)
        torch.testing.assert_close(scores, logits.detach().chunk(size, -1)[rank], **EXACT)
        torch.testing.assert_close(gradient, weight.grad.chunk(size)[rank], **EXACT)


def adjoints(rank: int, size: int) -> list[tuple[float, float]]:
    """(<f(x), y>, <x, f's gradient of y>) on this rank, for every linear operation over ranks."""
    axis, context = model_axis(rank, size), Axis("context", size, rank, tuple(range(size)))
    found = []
    for function, shape in (
        (lambda x: reduce_from_tp(x, axis), (LENGTH, BATCH)),
        (lambda x: all_to_all_seq_to_heads(x, context), (BATCH, 4, LENGTH, 5)),
        (lambda x: all_to_all_heads_to_seq(x, context), (BATCH, 4, LENGTH, 5)),
    ):
        x = fixed(*shape, seed=rank).requires_grad_()
        out = function(x)
        y = fixed(*out.shape, seed=10 + rank)
        out.backward(y)
        found.append((float((out * y).sum()), float((x * x.grad).sum())))
    return found


@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_adjoint(size: int, worlds: Worlds) -> None:
    """For an operation that is linear over all ranks together this is what gradcheck would say of it."""
    for over_ranks in zip(*worlds[size][adjoints], strict=True):
        assert sum(one for one, _ in over_ranks) == pytest.approx(sum(two for _, two in over_ranks), rel=1e-12)


def exchanged(rank: int, size: int) -> tuple[Tensor, Tensor]:
    """Attention over exchanged heads: this rank's part of the sequence, and the gradient of its queries."""
    axis = Topology.build(pipe=1, model=1, context=size, rank=rank, world_size=size).context
    q, k, v = (fixed(2, heads, LENGTH, 5, seed=heads + i).chunk(size, 2)[rank] for i, heads in enumerate((8, 4, 4)))
    q = q.clone().requires_grad_()
    out = plain_attention(*(all_to_all_seq_to_heads(x, axis) for x in (q, k, v)))
    back = all_to_all_heads_to_seq(out, axis)
    back.backward(fixed(2, 8, LENGTH, 5, seed=30).chunk(size, 2)[rank])
    return back.detach(), q.grad


@pytest.mark.parametrize("size", SIZES)
def test_attention_over_exchanged_heads(size: int, worlds: Worlds) -> None:
    q, k, v = (fixed(2, heads, LENGTH, 5, seed=heads + i) for i, heads in enumerate((8, 4, 4)))
    q.requires_grad_()
    out = plain_attention(q, k, v)
    out.backward(fixed(2, 8, LENGTH, 5, seed=30))
    for rank, (part_out, gradient) in enumerate(worlds[size][exchanged]):
        torch.testing.assert_close(part_out, out.detach().chunk(size, 2)[rank], rtol=1e-6, atol=1e-7)  # fp32 softmax
        torch.testing.assert_close(gradient, q.grad.chunk(size, 2)[rank], rtol=1e-6, atol=1e-6)


def low_precision(rank: int, size: int) -> tuple[Tensor, Tensor]:
    """Sums of numbers of which bfloat16 would lose one in a thousand, with and without fp32 sums."""
    axis = Topology.build(
        pipe=1, model=size, rank=rank, world_size=size, sequence_parallel=True, fp32_reduce=True
    ).model
    x = torch.full((size, 4), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    return reduce_scatter_first(x, axis), all_gather_first(x[:1], axis)


def test_fp32_sums(worlds: Worlds) -> None:
    """256 + 1 + 1 + 1 is 260 when rounded once, and 256 when bfloat16 is rounded after every addition of one."""
    for summed, gathered in worlds[4][low_precision]:
        assert summed.dtype == torch.bfloat16
        assert torch.equal(summed, torch.full((1, 4), 260.0, dtype=torch.bfloat16))
        assert gathered[:, 0].tolist() == [256, 1, 1, 1]


def test_uneven_sequences_are_refused() -> None:
    three = Axis("context", 3, 0, (0, 1, 2))
    with pytest.raises(ValueError, match="a sequence of 8 does not divide by 3, as 3 context-parallel ranks"):
        SequenceShards(three, three).shard(torch.zeros(1, 8))
    with pytest.raises(ValueError, match="a sequence of 9 does not divide by 6, as 3 context-parallel ranks"):
        SequenceShards(three, ring=three).shard(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="a sequence of 8 does not divide by 3 tensor-parallel ranks"):
        reduce_scatter_first(torch.zeros(8, 1), three)
