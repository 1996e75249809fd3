"""Every parallel layer and every exchange between ranks against central differences in float64.

torch.autograd.gradcheck moves one element on one process; here all ranks compute together while one element of one
rank's tensor is moved, or, where the tensor is a copy that every rank holds, that element of all copies. The function
is one number that all ranks agree on: a weighted sum of the outputs, added up over ranks where they hold parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.distributed.collectives import copy_to, gather_from, reduce_from, scatter_to
from megatron.distributed.context_parallel.ulysses import all_to_all_heads_to_seq, all_to_all_seq_to_heads
from megatron.distributed.expert_all_to_all import all_to_all_rows
from megatron.distributed.mesh import Axis, Topology
from megatron.distributed.param_init import ParamFactory
from megatron.distributed.partial_grads import mark_partial_grad
from megatron.distributed.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy, weighted_cross_entropy
from megatron.distributed.tensor_parallel.embedding import VocabParallelEmbedding
from megatron.distributed.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron.distributed.tensor_parallel.sequence_parallel import reduce_from_tp
from megatron.model.norms.layernorm import LayerNorm
from tests.multi_rank import run_distributed

STEP, TOLERANCE = 1e-6, 1e-7
S, B, H, INNER, VOCABULARY = 4, 1, 4, 8, 8


@dataclass(frozen=True)
class Case:
    """A function of tensors. copies: those that are the same on every rank; parts: those of which each has its own.

    whole: whether every rank computes the whole output, rather than a part of it.
    """

    function: Callable[[], Tensor]
    copies: tuple[Tensor, ...] = ()
    parts: tuple[Tensor, ...] = ()
    is_full: bool = False


def values(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def draw(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(generator=generator)


def cases(rank: int, size: int) -> dict[str, Case]:
    """Everything there is, on this rank's axis."""
    is_full, cut = (
        Topology.build(pipe=1, model=size, rank=rank, world_size=size, sequence_parallel=sequence).model
        for sequence in (False, True)
    )
    layers = {f"{name}, sequence": case for name, case in layer_cases(cut).items()}
    return layer_cases(is_full) | layers | exchange_cases(is_full)


def layer_cases(axis: Axis) -> dict[str, Case]:
    """The layers, with the whole sequence on every rank or a part of it."""
    source, mine = ParamFactory(seed=3, layer=2, axis=axis, dtype=torch.float64), 100 + axis.rank
    column = ColumnParallelLinear(H, INNER, source.of("column"), init_fn=draw, bias=True)
    row = RowParallelLinear(INNER, H, source.of("row"), init_fn=draw, bias=True)
    embedding = VocabParallelEmbedding(VOCABULARY, H, source.of("words"), init_fn=draw)
    norm = LayerNorm(H, 1e-5, bias=True).double()
    x, ids = values(S, B, H, seed=1), torch.arange(S * B).view(S, B) % VOCABULARY
    inner, term = values(S, B, INNER // axis.size, seed=mine), values(S, B, H, seed=mine)
    if axis.sequence_parallel:
        x = values(S // axis.size, B, H, seed=mine)
        for parameter in norm.parameters():
            mark_partial_grad(parameter, axis)
    own, everywhere = ((x,), ()) if axis.sequence_parallel else ((), (x,))
    return {
        "column": Case(lambda: column(x), copies=everywhere, parts=(*own, column.weight, column.bias)),
        "row": Case(
            lambda: row(inner), copies=(row.bias,), parts=(inner, row.weight), is_full=not axis.sequence_parallel
        ),
        "embedding": Case(lambda: embedding(ids), parts=(embedding.weight,), is_full=not axis.sequence_parallel),
        "output layer": Case(
            lambda: embedding(x, as_output_layer=True), copies=everywhere, parts=(*own, embedding.weight)
        ),
        "norm": Case(
            lambda: norm(x), copies=(*everywhere, *norm.parameters()), parts=own, is_full=not axis.sequence_parallel
        ),
        "leave": Case(lambda: reduce_from_tp(term, axis), parts=(term,), is_full=not axis.sequence_parallel),
    }


def exchange_cases(axis: Axis) -> dict[str, Case]:
    """The exchanges by themselves, and the cross entropy."""
    rank, size, mine = axis.rank, axis.size, 100 + axis.rank
    part, copy = values(2, INNER // size, seed=mine), values(2, INNER, seed=2)
    targets = torch.tensor([0, VOCABULARY - 2])
    weights = torch.tensor([0.3, 0.0], dtype=torch.float64)
    logits = values(2, VOCABULARY // size, seed=mine)
    heads, tokens = values(1, size, 2, 2, seed=mine), values(1, 1, 2 * size, 2, seed=mine)
    counts = [[1 + (i + j) % 2 for j in range(size)] for i in range(size)]  # row i: from rank i
    sent, received = counts[rank], [row[rank] for row in counts]
    rows = values(sum(sent), 2, seed=mine)
    return {
        "all_to_all_rows": Case(lambda: all_to_all_rows(rows, sent, received, axis) ** 2, parts=(rows,)),
        "copy_to": Case(lambda: copy_to(copy, axis) * (rank + 1), copies=(copy,)),
        "reduce_from": Case(lambda: reduce_from(part, axis), parts=(part,), is_full=True),
        "gather_from": Case(lambda: gather_from(part, axis), parts=(part,), is_full=True),
        "scatter_to": Case(lambda: scatter_to(copy, axis), copies=(copy,)),
        "cross entropy": Case(
            lambda: vocab_parallel_cross_entropy(logits, targets, axis, VOCABULARY - 1), parts=(logits,), is_full=True
        ),
        "weighted cross entropy": Case(
            lambda: weighted_cross_entropy(logits * 1, targets, weights, axis, VOCABULARY - 1),
            parts=(logits,),
            is_full=True,
        ),
        "heads for sequence": Case(lambda: all_to_all_seq_to_heads(heads, axis) ** 2, parts=(heads,)),
        "sequence for heads": Case(lambda: all_to_all_heads_to_seq(tokens, axis) ** 2, parts=(tokens,)),
    }


def number(case: Case, rank: int) -> Tensor:
    """This rank's share of the function, with a graph."""
    out = case.function()
    seed = 50 if case.is_full else 50 + rank
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (out * weights).sum()


@torch.no_grad()
def value(case: Case, rank: int) -> float:
    """The function, the same on all ranks."""
    found = number(case, rank).detach().clone()
    if not case.is_full:
        dist.all_reduce(found)
    return float(found)


def differences(case: Case, tensor: Tensor, rank: int, mover: int | None) -> Tensor:
    """Central differences for every element of a tensor, of the rank `mover` or of all ranks."""
    flat = tensor.detach().view(-1)
    found = torch.zeros_like(flat)
    for position in range(len(flat)):
        here, at = flat[position].item(), []
        for sign in (1, -1):
            if mover in (None, rank):
                flat[position] = here + sign * STEP
            at.append(value(case, rank))
            flat[position] = here
        found[position] = (at[0] - at[1]) / (2 * STEP)
    return found.view_as(tensor)


def check(rank: int, size: int) -> dict[str, float]:
    """Case -> the largest difference between its gradients and central differences on this rank."""
    worst = {}
    for name, case in cases(rank, size).items():
        for tensor in (*case.copies, *case.parts):
            tensor.grad = None  # another case may have used it
        number(case, rank).backward()
        distances = []
        for tensor in case.copies:
            assert tensor.grad is not None, name
            distances.append((tensor.grad - differences(case, tensor, rank, None)).abs().max())
        for tensor in case.parts:
            assert tensor.grad is not None, name
            for mover in range(size):
                numeric = differences(case, tensor, rank, mover)
                if mover == rank:
                    distances.append((tensor.grad - numeric).abs().max())
        worst[name] = float(max(distances))
    return worst


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_are_those_of_central_differences(size: int) -> None:
    for rank, worst in enumerate(run_distributed(check, size)):
        assert {name: far for name, far in worst.items() if far > TOLERANCE} == {}, f"rank {rank}"
