"""Ring attention against attention of the full sequence in float64, what it sends, and how the work is shared."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.block_sparsity import layout_of
from megatron.distributed.context_parallel.ring import ring_attention
from megatron.distributed.context_parallel.sequence_shards import SequenceShards
from megatron.distributed.context_parallel.ulysses import all_to_all_heads_to_seq, all_to_all_seq_to_heads
from megatron.distributed.mesh import Topology
from megatron.kernels.attention_patterns import AttentionMask, BlockPattern, MaskPattern, Window
from tests.multi_rank import run_cases

LENGTH, BATCH, SIZE = 48, 2, 16  # 48 divides into the chunks of 2, 3 and 4 ranks, and of groups of them
DOCUMENTS = ((0, 5, 6, 24, 25, 40), (0, 31))  # where they start in each row


@dataclass(frozen=True)
class Case:
    """An attention."""

    heads: int = 4
    kv_heads: int = 4
    documents: bool = False
    window: int | None = None
    sparse: bool = False
    alibi: bool = False
    learned: bool = False
    sinks: bool = False
    dtype: torch.dtype = torch.float64
    ulysses: int = 1
    zigzag: bool = True

    def starts(self) -> Tensor | None:
        rows = [[max(start for start in row if start <= at) for at in range(LENGTH)] for row in DOCUMENTS]
        return torch.tensor(rows) if self.documents else None

    def bias(self) -> Tensor | None:
        if self.learned:
            return fixed(self.heads, LENGTH, seed=11)
        slopes = torch.tensor([2.0**-head for head in range(self.heads)], dtype=torch.float64)
        return -slopes[:, None] * torch.arange(LENGTH) if self.alibi else None

    def logits(self) -> Tensor | None:
        return fixed(self.heads, seed=13) if self.sinks else None

    def pattern(self, heads: range) -> MaskPattern | None:
        if self.sparse:
            layout = layout_of("bslongformer", {"block": 8, "num_sliding_window_blocks": 3}, 0)
            assert layout is not None
            return BlockPattern(layout, heads)
        return None if self.window is None else Window(self.window)


CASES = {
    "causal": Case(),
    "grouped": Case(kv_heads=2),
    "one key head": Case(kv_heads=1),
    "documents": Case(kv_heads=2, documents=True),
    "window": Case(window=13),
    "window of one block of keys and less": Case(window=2, documents=True),
    "sparse layout": Case(sparse=True),
    "ALiBi": Case(alibi=True, kv_heads=2),
    "learned bias": Case(learned=True, documents=True),
    "all": Case(kv_heads=2, documents=True, window=20, alibi=True),
    "sinks": Case(kv_heads=2, documents=True, window=20, sinks=True),
    "fp32": Case(kv_heads=2, documents=True, window=20, alibi=True, dtype=torch.float32),
    "bf16": Case(kv_heads=2, documents=True, dtype=torch.bfloat16),
}
WITHIN = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
IN_GROUPS = {
    "two groups": Case(kv_heads=2, documents=True, alibi=True, ulysses=2),
    "learned": Case(learned=True, ulysses=2),
}
IN_ORDER = {"in order": Case(kv_heads=2, documents=True, zigzag=False)}
WORLDS = {2: CASES, 3: CASES | IN_ORDER, 4: CASES | IN_GROUPS}


def fixed(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(case: Case) -> list[Tensor]:
    """Queries, keys, values and the gradient of the result, of the full sequence."""
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return [fixed(BATCH, count, LENGTH, SIZE, seed=seed).to(case.dtype) for seed, count in enumerate(heads)]


def expected(case: Case) -> list[Tensor]:
    """The result, and the gradients of queries, keys, values, the bias and the sinks, by the formula in float64."""
    q, k, v, grad = (x.double() for x in inputs(case))
    bias, sinks = case.bias(), case.logits()
    leaves = [x.requires_grad_() for x in (q, k, v, *(one for one in (bias, sinks) if one is not None))]
    group = case.heads // case.kv_heads
    at = torch.arange(LENGTH)
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) / math.sqrt(SIZE)
    if bias is not None:
        scores = scores + bias[:, (at[:, None] - at).clamp(min=0)]
    seen = (at <= at[:, None])[None, None]
    starts, pattern = case.starts(), case.pattern(range(case.heads))
    if starts is not None:
        seen = seen & (at >= starts[:, None, :, None])
    if pattern is not None:
        seen = seen & pattern.sees(at[None, :, None], at[None, None])
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    out = weights @ v.repeat_interleave(group, 1)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@cache
def shards_of(rank: int, size: int, ulysses: int, zigzag: bool = True) -> SequenceShards:
    topology = Topology.build(pipe=1, model=1, context=size, rank=rank, world_size=size, ulysses=ulysses, zigzag=zigzag)
    return SequenceShards.of(topology)


def attended(rank: int, size: int, case: Case) -> list[Tensor]:
    """This rank's part of what `expected` returns; its own term of the gradient of the bias."""
    shards = shards_of(rank, size, case.ulysses, case.zigzag)
    mine = shards.positions(LENGTH // size, torch.device("cpu"))
    *leaves, grad = (x[:, :, mine] for x in inputs(case))
    leaves = [x.clone().requires_grad_() for x in leaves]
    bias = case.bias()
    count = case.heads // case.ulysses
    core = range(shards.ulysses.rank * count, (shards.ulysses.rank + 1) * count)
    view = AttentionMask(case.pattern(core), None)
    if bias is not None:
        leaves.append(bias.to(torch.promote_types(case.dtype, torch.float32)).requires_grad_(case.learned))
        view = AttentionMask(case.pattern(core), leaves[-1][core.start : core.stop])
    sinks = case.logits()
    if sinks is not None:
        leaves.append(sinks.requires_grad_())
        view = replace(view, sinks=leaves[-1][core.start : core.stop])
    exchanged = (all_to_all_seq_to_heads(x, shards.ulysses) for x in leaves[:3])
    out = all_to_all_heads_to_seq(ring_attention(*exchanged, shards, case.starts(), view), shards.ulysses)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


Found = dict[Any, list[Any]]


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest) -> tuple[int, Found]:
    size: int = request.param
    return size, run_cases({name: (attended, case) for name, case in WORLDS[size].items()}, size)


def test_it_is_attention_of_the_full_sequence(world: tuple[int, Found]) -> None:
    """Results and gradients of each rank are those of its positions; the gradient of a bias is a sum over ranks."""
    size, found = world
    for name, case in WORLDS[size].items():
        shards = [zigzag(rank, size, case.ulysses) for rank in range(size)]
        order = torch.cat(shards) if case.zigzag else torch.arange(LENGTH)
        assert sorted(order.tolist()) == list(range(LENGTH))
        for number, value in enumerate(expected(case)):
            of_ranks = [parts[number] for parts in found[name] if number < len(parts)]
            if number < 4:
                got = torch.empty_like(value)
                got[:, :, order] = torch.cat(of_ranks, dim=2).double()
                assert of_ranks[0].dtype == case.dtype
            elif case.learned:
                got = sum(of_ranks).double()
            else:
                continue
            difference = float((got - value).abs().max() / value.abs().max())
            assert difference < WITHIN[case.dtype], (name, number, difference)


def zigzag(rank: int, size: int, ulysses: int) -> Tensor:
    """The positions of a rank, counted by hand: chunks i and 2 r - 1 - i of a ring of r, and its part of them."""
    members = size // ulysses
    member, part = divmod(rank, ulysses)
    chunk = LENGTH // (2 * members)
    first, second = member * chunk, (2 * members - 1 - member) * chunk
    both = [*range(first, first + chunk), *range(second, second + chunk)]
    share = len(both) // ulysses
    return torch.tensor(both[part * share : (part + 1) * share])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_has_the_same_work(size: int) -> None:
    """Score cells that causal attention computes on each rank, of all its positions and those before them."""
    cells = [int((zigzag(rank, size, 1) + 1).sum()) for rank in range(size)]
    assert max(cells) <= 1.05 * min(cells)
    in_order = [sum(range(rank * LENGTH // size + 1, (rank + 1) * LENGTH // size + 1)) for rank in range(size)]
    assert max(in_order) > 2 * min(in_order)


def sent(rank: int, size: int, case: Case) -> tuple[int, int]:
    """Bytes that this rank sends in the forward and in the backward pass."""
    counted = [0]
    plain = dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> list[dist.Work]:
        counted[0] += sum(each.tensor.nbytes for each in operations if each.op is dist.isend)
        return plain(operations)

    shards = shards_of(rank, size, 1)
    q, k, v, _ = (x[:, :, : LENGTH // size].clone().requires_grad_() for x in inputs(case))
    dist.batch_isend_irecv = counting
    try:
        out = ring_attention(q, k, v, shards)
        forward = counted[0]
        out.sum().backward()
    finally:
        dist.batch_isend_irecv = plain
    return forward, counted[0] - forward


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_on_the_wire(size: int) -> None:
    """Forward 2 (keys, values) x (c - 1)/c of the full sequence; backward the same, and as many gradients."""
    case = Case(kv_heads=2, dtype=torch.float32)
    full = 2 * BATCH * case.kv_heads * LENGTH * SIZE * 4
    for forward, backward in run_cases({"sent": (sent, case)}, size)["sent"]:
        assert forward == full * (size - 1) // size
        assert backward == 2 * full * (size - 1) // size


def test_a_bound_of_scores_is_refused() -> None:
    x = torch.zeros(1, 1, 4, SIZE)
    with pytest.raises(ValueError, match="no bound of scores"):
        ring_attention(x, x, x, SequenceShards(), None, AttentionMask(softcap=1.0))
