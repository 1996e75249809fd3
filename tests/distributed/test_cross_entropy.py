"""Cross entropy against torch in float64, whole and with its vocabulary cut over ranks; the objective's mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.distributed.mesh import Topology
from megatron.distributed.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy, weighted_cross_entropy
from megatron.kernels import cross_entropy as kernel
from megatron.kernels.cross_entropy import plain_cross_entropy
from megatron.objectives.language_model import LanguageModel
from tests.multi_rank import run_cases

VOCABULARY, SHAPE = 48, (5, 3)
ONE = Topology.single().model


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Logits with rows of very large, very small and even values; targets; weights with zeros among them."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(*SHAPE, VOCABULARY, generator=generator, dtype=torch.float64)
    logits[0, 0] += 1e4
    logits[1, 1, 7] = 500.0
    logits[2, 2] = 0.0
    targets = torch.randint(0, VOCABULARY, SHAPE, generator=generator)
    targets[1, 1] = 8  # its probability is exp(-500), below the smallest fp32 number
    weights = torch.rand(SHAPE, generator=generator) * (torch.rand(SHAPE, generator=generator) > 0.3)
    return logits.float().double(), targets, weights


def reference() -> tuple[Tensor, Tensor]:
    """Losses of each token and the gradient of their weighted sum, by torch in float64."""
    logits, targets, weights = problem()
    logits.requires_grad_()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(SHAPE)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
    return losses.detach(), gradient


@pytest.mark.parametrize("block", [1 << 20, 1])
def test_full_vocabulary(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(kernel, "BLOCK_ELEMENTS", block)
    losses, gradient = reference()
    logits, targets, weights = problem()
    for function in (
        lambda x: vocab_parallel_cross_entropy(x, targets, ONE),
        lambda x: plain_cross_entropy(x, targets),
    ):
        single = logits.float().requires_grad_()
        actual = function(single)
        torch.testing.assert_close(actual.double(), losses, rtol=1e-6, atol=1e-3)  # fp32 spacing at 1e4 is 1e-3
        torch.testing.assert_close(actual.double()[1:], losses[1:], rtol=1e-5, atol=1e-6)
        (got,) = torch.autograd.grad((actual * weights).sum(), single)
        torch.testing.assert_close(got.double(), gradient, rtol=1e-3, atol=1e-6)


def test_gradcheck_in_float64() -> None:
    logits, targets, _ = problem()
    logits = logits.clamp(-10, 10).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_cross_entropy(x, targets, ONE), (logits,))


def sharded(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    axis = Topology.build(pipe=1, model=world_size, rank=rank, world_size=world_size).model
    logits, targets, weights = problem()
    mine = logits.float().chunk(world_size, dim=-1)[rank].contiguous().requires_grad_()
    losses = vocab_parallel_cross_entropy(mine, targets, axis)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), mine)
    total = weighted_cross_entropy(mine * 1, targets, weights, axis)
    (weighted,) = torch.autograd.grad(total, mine)
    return losses.detach(), gradient, total.detach(), weighted


Worlds = dict[int, dict[Any, list[Any]]]
"""Ranks -> function -> what each rank computed."""


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    return {size: run_cases({function: (function,) for function in (sharded, padded)}, size) for size in (1, 2, 4)}


@pytest.mark.parametrize("size", [2, 4])
def test_vocabulary_cut_over_ranks(size: int, worlds: Worlds) -> None:
    losses, gradient = reference()
    _, _, weights = problem()
    results = worlds[size][sharded]
    for actual, _, total, _ in results:
        torch.testing.assert_close(actual.double()[1:], losses[1:], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(total.double(), (losses * weights).sum(), rtol=1e-5, atol=1e-3)
    for which in (1, 3):
        joined = torch.cat([result[which] for result in results], dim=-1).double()
        torch.testing.assert_close(joined, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_weighted_gradient_takes_the_memory_of_the_logits(scale: float) -> None:
    _, gradient = reference()
    values, targets, weights = problem()
    leaf = values.float().requires_grad_()
    logits = leaf * 1
    total = weighted_cross_entropy(logits, targets, weights, ONE)
    address = logits.data_ptr()
    (total * scale).backward(inputs=[logits, leaf])
    torch.testing.assert_close(leaf.grad.double(), scale * gradient, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(torch.as_tensor(logits.detach()), leaf.grad, rtol=0, atol=0)
    assert logits.data_ptr() == address


def test_the_gradient_is_handed_out_once() -> None:
    values, targets, weights = problem()
    total = weighted_cross_entropy(values.float().requires_grad_() * 1, targets, weights, ONE)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        total.backward()


def test_another_use_of_the_logits_is_noticed() -> None:
    """An operation that kept the logits for its own gradient must not read the overwritten ones in silence."""
    values, targets, weights = problem()
    logits = values.float().requires_grad_() * 1
    other = logits.square().sum()
    total = weighted_cross_entropy(logits, targets, weights, ONE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (total + other).backward()


def test_logits_stay_where_no_gradient_is_needed() -> None:
    values, targets, weights = problem()
    logits = values.float().requires_grad_()
    with torch.no_grad():
        weighted_cross_entropy(logits, targets, weights, ONE)
    assert torch.equal(logits, values.float())


def test_bf16_logits_give_fp32_losses() -> None:
    values, targets, _ = problem()
    short = values[1:].bfloat16()
    losses = vocab_parallel_cross_entropy(short, targets[1:], ONE)
    expected = F.cross_entropy(short.double().flatten(0, 1), targets[1:].flatten(), reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double().flatten(), expected, rtol=1e-5, atol=1e-5)


def test_the_objective_is_the_sum_over_unmasked_tokens_by_their_count() -> None:
    values, targets, _ = problem()
    logits, labels = values[1:].float(), targets[1:].t()
    mask = torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]])
    losses, _ = reference()
    expected = (losses[1:].t() * mask).sum() / 20
    loss = LanguageModel().loss(logits, labels, mask, ONE, tokens=torch.tensor(20.0))
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_fully_masked_micro_batch_has_loss_zero_and_gradient_zero() -> None:
    values, targets, _ = problem()
    leaf = values.float().requires_grad_()
    loss = LanguageModel().loss(leaf * 1, targets.t(), torch.zeros(3, 5), ONE, tokens=torch.ones(()))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.count_nonzero(leaf.grad) == 0


EXISTING = 37  # of the vocabulary: cut over 4 ranks, the last one holds padding only and the one before it some


def padded(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of each token, their weighted sum, and the gradient by either function, where the end is padding."""
    axis = Topology.build(pipe=1, model=world_size, rank=rank, world_size=world_size).model
    logits, targets, weights = problem()
    targets = targets % EXISTING
    mine = logits.float().chunk(world_size, dim=-1)[rank].contiguous().requires_grad_()
    losses = vocab_parallel_cross_entropy(mine, targets, axis, EXISTING)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), mine)
    total = weighted_cross_entropy(mine * 1, targets, weights, axis, EXISTING)
    (weighted,) = torch.autograd.grad(total, mine)
    return losses.detach(), gradient, total.detach(), weighted


@pytest.mark.parametrize("size", [1, 2, 4])
def test_padding_has_no_probability(size: int, worlds: Worlds) -> None:
    """Whatever a vocabulary is padded to, the loss is that of the tokens which exist."""
    logits, targets, weights = problem()
    logits.requires_grad_()
    flat = logits[..., :EXISTING].flatten(0, 1)
    losses = F.cross_entropy(flat, (targets % EXISTING).flatten(), reduction="none").view(SHAPE)
    (expected,) = torch.autograd.grad((losses * weights).sum(), logits)
    for rank, (got, gradient, total, weighted) in enumerate(worlds[size][padded]):
        torch.testing.assert_close(got.double(), losses.detach(), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(total.double(), (losses * weights).sum().detach(), rtol=1e-5, atol=1e-3)
        mine = expected.chunk(size, dim=-1)[rank]
        for one in (gradient, weighted):
            torch.testing.assert_close(one.double(), mine, rtol=1e-3, atol=1e-6)
            assert not one[..., max(0, EXISTING - rank * one.shape[-1]) :].any()
