"""Routers, experts and the losses of routers, against loops in float64, hand computations and transformers' Mixtral."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from megatron.distributed.mesh import Axis, Topology
from megatron.kernels.grouped_matmul import plain_grouped
from megatron.model.moe.layer import MoELayer
from megatron.model.moe.losses import RouterLossTracker, load_balance, mean_weights, z_loss
from megatron.model.moe.router import balanced, sinkhorn, topk
from megatron.registry import ACTIVATIONS, ROUTERS
from tests.model.mixtures import mixture
from tests.multi_rank import run_distributed

ALONE = Axis("context")
GATED = {"activation": "swiglu"}


def hidden(length: int = 12, batch: int = 3) -> Tensor:
    return torch.randn(length, batch, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def visit(mlp: MoELayer, expert: int, token: Tensor, activation: str) -> Tensor:
    """One token through one expert, matrix by matrix."""
    stack, count = mlp.experts.mlp, 4
    width = stack.w1.shape[0] // count
    rows = slice(expert * width, (expert + 1) * width)
    inner = stack.w1[rows] @ token
    if stack.w3 is not None:
        inner = torch.cat((stack.w3[rows] @ token, inner))
    return ACTIVATIONS.load(activation)(inner) @ stack.w2[rows]


def loop(mlp: MoELayer, x: Tensor, activation: str, slots: int | None = None) -> Tensor:
    """What the mixture should give, token by token. slots: of an expert; who comes later finds it full."""
    taken = [0] * 4
    out = torch.zeros_like(x)
    for s in range(x.shape[0]):
        for b in range(x.shape[1]):
            probabilities = (mlp.router.layer.weight @ x[s, b]).softmax(-1)
            for expert in probabilities.argsort(descending=True)[:2].tolist():
                taken[expert] += 1
                if slots is None or taken[expert] <= slots:
                    out[s, b] += probabilities[expert] * visit(mlp, expert, x[s, b], activation)
    return out


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("slots", [None, 15])
def test_a_mixture_is_a_loop_over_tokens(activation: str, slots: int | None) -> None:
    """In float64. 36 tokens and 2 choices of 4 experts: 18 slots would be the fair share."""
    factor = None if slots is None else slots * 4 / 72
    mlp = mixture(torch.float64, model={"activation": activation}, moe_capacity_factor=factor)
    with torch.no_grad():
        expected = loop(mlp, hidden(), activation, slots)
        torch.testing.assert_close(mlp(hidden()), expected, rtol=1e-9, atol=1e-9)
        evaluated = mlp.eval()(hidden())  # no capacity is given for evaluation
    torch.testing.assert_close(evaluated, loop(mlp, hidden(), activation), rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_the_loop() -> None:
    mlp = mixture(torch.float64, model=GATED)
    x = hidden(4).requires_grad_()
    target = torch.autograd.grad(loop(mlp, x, "swiglu").square().sum(), [x, *mlp.parameters()])
    found = torch.autograd.grad(mlp(x).square().sum(), [x, *mlp.parameters()])
    for value, expected in zip(found, target, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_no_token_pushes_out_an_earlier_one() -> None:
    """With slots for half of the assignments, the first positions do not depend on the last ones."""
    mlp = mixture(torch.float64, moe_capacity_factor=0.5)
    x, other = hidden(), hidden()
    other[6:] = torch.randn(6, 3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    slots = 12 * 3 * 2 * 0.5 / 4
    with torch.no_grad():
        first, second = mlp(x), mlp(other)
        assert mlp._slots(36) == math.ceil(slots)
    torch.testing.assert_close(first[:6], second[:6])
    assert not torch.allclose(first[6:], second[6:])


def test_an_expert_has_a_least_number_of_slots() -> None:
    assert mixture(moe_capacity_factor=0.1, moe_min_capacity=9)._slots(36) == 9
    assert mixture(moe_eval_capacity_factor=2.0).eval()._slots(36) == 36
    assert mixture()._slots(36) is None


def test_empty_experts_get_a_gradient_of_zeros() -> None:
    """Who waits for the gradient of every parameter must not wait for ever."""
    rows, matrices = torch.randn(3, 4), torch.randn(3, 4, 5, requires_grad=True)
    plain_grouped(rows, matrices, torch.tensor([0, 3, 0])).sum().backward()
    assert matrices.grad is not None
    assert matrices.grad[0].count_nonzero() == 0
    assert plain_grouped(rows[:0], matrices, torch.tensor([0, 0, 0])).requires_grad


def logits(tokens: int = 64) -> Tensor:
    return 2 * torch.randn(tokens, 4, generator=torch.Generator().manual_seed(4))


def test_topk_takes_the_most_probable() -> None:
    weights, experts = topk(logits(), 2, training=True, axis=ALONE)
    probabilities = logits().softmax(-1)
    order = probabilities.argsort(dim=-1, descending=True)[:, :2]
    assert torch.equal(experts, order)
    assert torch.equal(weights, probabilities.gather(1, order))


def test_sinkhorn_balances_in_training_only() -> None:
    skewed = logits() + torch.tensor([3.0, 0.0, 0.0, 0.0])
    matrix = balanced(skewed, ALONE)
    torch.testing.assert_close(matrix.sum(0), torch.full((4,), 0.25), rtol=1e-2, atol=0)
    torch.testing.assert_close(matrix.sum(1), torch.full((64,), 1 / 64), rtol=1e-2, atol=0)
    for k in (1, 2):
        weights, experts = sinkhorn(skewed, k, training=True, axis=ALONE)
        greedy, favourites = sinkhorn(skewed, k, training=False, axis=ALONE)
        assert torch.equal(favourites, skewed.topk(k, dim=-1).indices)
        assert experts.flatten().bincount(minlength=4).max() < favourites.flatten().bincount(minlength=4).max()
        scores = skewed.sigmoid() if k == 1 else skewed.softmax(-1)
        assert torch.equal(weights, scores.gather(1, experts))
        assert torch.equal(greedy, scores.gather(1, favourites))


def part_of_sinkhorn(rank: int, size: int) -> Tensor:
    axis = Topology.build(pipe=1, model=1, context=size, rank=rank, world_size=size).context
    return balanced(logits().chunk(size)[rank], axis)


def test_sinkhorn_is_the_same_on_parts_of_a_sequence() -> None:
    torch.testing.assert_close(torch.cat(run_distributed(part_of_sinkhorn, 2)), balanced(logits(), ALONE))


def test_the_losses_are_those_of_the_papers() -> None:
    probabilities = logits().softmax(-1)
    experts = probabilities.topk(2, dim=-1).indices
    counts = experts.flatten().bincount(minlength=4)
    found = load_balance(probabilities, counts, ALONE)
    by_hand = 4 * sum(float(counts[i]) / 128 * float(probabilities[:, i].mean()) for i in range(4))
    assert found.item() == pytest.approx(by_hand, rel=1e-6)
    theirs = load_balancing_loss_func((logits(),), num_experts=4, top_k=2)
    assert found.item() == pytest.approx(theirs.item() / 2, rel=1e-6)  # theirs counts every choice of a token
    even = torch.full((64, 4), 0.25)
    assert load_balance(even, torch.full((4,), 32), ALONE).item() == pytest.approx(1.0)
    assert z_loss(logits()).item() == pytest.approx((logits().exp().sum(-1).log() ** 2).mean().item(), rel=1e-6)


@pytest.mark.parametrize("router", ROUTERS.names)
def test_the_losses_are_in_the_gradient(router: str) -> None:
    """The router's gradient is that of the sum of all three losses, each scaled alike, and the values are reported."""
    losses = RouterLossTracker(0.3, 0.2)
    losses.scale = 0.25
    mlp = mixture(losses=losses, moe_router_type=router, moe_jitter_eps=0.0)
    x, weight = hidden().float(), mlp.router.layer.weight
    (0.25 * mlp(x).square().sum()).backward()
    found, weight.grad = weight.grad, None
    losses.balance = losses.z = 0.0
    scores = F.linear(x.flatten(0, 1), weight)
    experts = ROUTERS.load(router)(scores, 2, training=True, axis=ALONE)[1]
    counts = experts.flatten().bincount(minlength=4)
    more = 0.3 * load_balance(scores.softmax(-1), counts, ALONE) + 0.2 * z_loss(scores)
    (0.25 * (mlp(x).square().sum() + more)).backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-5)
    reported = losses.take(Topology.single(), torch.device("cpu"))
    assert reported["moe_z_loss"].item() == pytest.approx(z_loss(scores).item(), rel=1e-6)
    assert reported["moe_dropped"].item() == 0


LENGTHS = (12, 3, 7)
"""Tokens of each row of `hidden()`; the rest is padding."""


def padding() -> Tensor:
    return torch.arange(12) >= torch.tensor(LENGTHS)[:, None]  # [b, s]


def reported_losses(router: str, x: Tensor, mask: Tensor | None, **changes: object) -> dict[str, float]:
    losses = RouterLossTracker(0.3, 0.2)
    mixture(losses=losses, moe_router_type=router, **changes)(x, mask).sum().backward()
    return {name: value.item() for name, value in losses.take(Topology.single(), torch.device("cpu")).items()}


@pytest.mark.parametrize("router", ROUTERS.names)
def test_padding_counts_in_no_loss_of_the_router(router: str) -> None:
    """As with an attention mask in transformers, whose own tokens give their own loss alone."""
    x = hidden().float()
    found = reported_losses(router, x, padding())
    scores = F.linear(x, mixture(moe_router_type=router).router.layer.weight)  # [s, b, e]
    rows = scores.transpose(0, 1).flatten(0, 1)  # transformers has rows of sequences
    real = rows[~padding().flatten()]
    assert found["moe_z_loss"] == pytest.approx((real.exp().sum(-1).log() ** 2).mean().item(), rel=1e-5)
    if router == "topk":
        theirs = load_balancing_loss_func((rows,), 4, 2, attention_mask=(~padding()).long())
        assert found["moe_load_balance_loss"] == pytest.approx(theirs.item() / 2, rel=1e-5)
    alone = torch.cat([x[:length, row] for row, length in enumerate(LENGTHS)])[:, None]  # [real tokens, 1, h]
    assert found == pytest.approx(reported_losses(router, alone, None), rel=1e-5)
    assert found != pytest.approx(reported_losses(router, x, None), rel=1e-2)


@pytest.mark.parametrize("slots", [None, 8])
def test_padding_takes_no_slot_of_an_expert(slots: int | None) -> None:
    """In float64: real tokens have what they have without padding, whose experts with a limit are none."""
    factor = None if slots is None else slots * 4 / 72
    losses = RouterLossTracker(0.1, 0.0)
    mlp = mixture(torch.float64, losses=losses, moe_capacity_factor=factor)
    x, mask = hidden(), padding().t()  # [s, b]
    made = mlp(x, padding())
    made.sum().backward()
    dropped = losses.take(Topology.single(), torch.device("cpu"))["moe_dropped"].item()
    with torch.no_grad():
        real = loop(mlp, x[~mask][:, None], "gelu", slots)[:, 0]  # in the same order of positions
        torch.testing.assert_close(made[~mask], real, rtol=1e-9, atol=1e-9)
        chosen = torch.stack([(mlp.router.layer.weight @ token).topk(2).indices for token in x[~mask]]).flatten()
        counts = chosen.bincount(minlength=4)
    limit = 44 if slots is None else slots
    assert dropped == pytest.approx(1 - counts.clamp(max=limit).sum().item() / 44)
    assert (made[mask].count_nonzero() == 0) == (slots is not None)


def test_sinkhorn_balances_real_tokens_alone() -> None:
    real = torch.arange(64) % 3 != 1
    matrix = balanced(logits(), ALONE, real)
    torch.testing.assert_close(matrix[real], balanced(logits()[real], ALONE))
    for k in (1, 2):
        weights, experts = sinkhorn(logits(), k, training=True, axis=ALONE, real=real)
        alone, chosen = sinkhorn(logits()[real], k, training=True, axis=ALONE)
        assert torch.equal(experts[real], chosen) and torch.equal(weights[real], alone)
        assert torch.equal(experts[~real], logits()[~real].topk(k, dim=-1).indices)


def part_with_padding(rank: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    axis = Topology.build(pipe=1, model=1, context=size, rank=rank, world_size=size).context
    own = logits().chunk(size)[rank]
    real = (torch.arange(64) < 40).chunk(size)[rank]  # the second half has a fourth of the real tokens
    probabilities = own.softmax(-1)
    counts = probabilities.topk(2, dim=-1).indices[real].flatten().bincount(minlength=4)
    weights = mean_weights(real, axis)
    both = torch.stack((load_balance(probabilities, counts, axis, weights), z_loss(own, weights)))
    return both, balanced(own, axis, real), weights


def test_padding_on_one_rank_is_the_same_as_in_one_process() -> None:
    found = run_distributed(part_with_padding, 2)
    real = logits()[:40]
    counts = real.softmax(-1).topk(2, dim=-1).indices.flatten().bincount(minlength=4)
    expected = torch.stack((load_balance(real.softmax(-1), counts, ALONE), z_loss(real)))
    torch.testing.assert_close(torch.stack([losses for losses, _, _ in found]).mean(0), expected)
    torch.testing.assert_close(torch.cat([matrix for _, matrix, _ in found])[:40], balanced(real, ALONE))
    assert torch.cat([weights for _, _, weights in found])[40:].count_nonzero() == 0


def test_jitter_is_noise_of_the_router_in_training() -> None:
    mlp = mixture(moe_jitter_eps=0.5)
    x = hidden().float()
    with torch.no_grad():
        assert not torch.equal(mlp(x), mlp(x))
        assert torch.equal(mlp.eval()(x), mlp(x))
        noisy = mlp.train()._jittered(torch.ones(1000, 8))
    assert 0.5 <= noisy.min() < 0.52 < 1.48 < noisy.max() <= 1.5


@pytest.mark.parametrize("name", ["gpt_j_residual", "gpt_j_tied"])
def test_a_parallel_residual_adds_a_mixture_too(name: str) -> None:
    """The block asks for the two halves of what forward does."""
    mlp = mixture(model={"gpt_j_residual": True, name: True})
    x = hidden().float()
    assert torch.equal(mlp.add_bias(mlp.partial(x)), mlp(x))
