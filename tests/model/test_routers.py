"""Scores, groups, biases and balance of routers, and shared experts: against the layers of transformers and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Glm4MoeConfig, GptOssConfig, Qwen2MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from megatron.distributed.mesh import Axis, Topology
from megatron.model.moe.layer import MoELayer
from megatron.model.moe.losses import RouterLossTracker, sequence_balance
from megatron.model.moe.router import RouterOptions, topk
from megatron.registry import ACTIVATIONS
from tests.model.mixtures import mixture

ALONE = Axis("context")
HIDDEN, WIDTH, SHARED, EXPERTS = 64, 24, 40, 8
GATED: dict[str, object] = {"activation": "swiglu"}
OWN: dict[str, Any] = {"moe_num_experts": EXPERTS, "moe_ffn_hidden_size": WIDTH}
GLM: dict[str, Any] = {
    **OWN,
    "moe_top_k": 3,
    "moe_router_score_function": "sigmoid",
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
    "moe_normalize_top_k": True,
    "moe_shared_expert_intermediate_size": SHARED,
}
QWEN: dict[str, Any] = {
    **OWN,
    "moe_top_k": 4,
    "moe_shared_expert_intermediate_size": SHARED,
    "moe_shared_expert_gate": True,
}


def tokens(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, 1, HIDDEN, generator=torch.Generator().manual_seed(seed))


def drawn(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return module


def glm() -> tuple[nn.Module, dict[str, Any]]:
    config = Glm4MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        n_shared_experts=1,
    )
    config.moe_intermediate_size = SHARED  # the shared expert's own width
    theirs = Glm4MoeMoE(config)
    config.moe_intermediate_size = WIDTH
    theirs.experts = type(theirs.experts)(config)
    theirs = drawn(theirs)
    theirs.gate.e_score_correction_bias.copy_(torch.linspace(-0.4, 0.4, EXPERTS))
    return theirs, GLM


def qwen2() -> tuple[nn.Module, dict[str, Any]]:
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=SHARED,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        norm_topk_prob=False,
    )
    return drawn(Qwen2MoeSparseMoeBlock(config)), QWEN


def take_over(ours: MoELayer, theirs: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies the weights of their layer into ours; returns name -> (our parameter, their parameter as ours has it)."""
    gate_up, down = theirs.experts.gate_up_proj, theirs.experts.down_proj
    shared = getattr(theirs, "shared_experts", None) or theirs.shared_expert
    pairs = {
        "router": (ours.router.layer.weight, theirs.gate.weight),
        "w1": (ours.experts.mlp.w1, gate_up[:, :WIDTH].flatten(0, 1)),
        "w3": (ours.experts.mlp.w3, gate_up[:, WIDTH:].flatten(0, 1)),
        "w2": (ours.experts.mlp.w2, down.transpose(1, 2).flatten(0, 1)),
        "shared 1": (
            ours.shared_experts.linear1.weight,
            torch.cat((shared.up_proj.weight, shared.gate_proj.weight)),
        ),
        "shared 2": (ours.shared_experts.linear2.weight, shared.down_proj.weight),
    }
    if ours.shared_experts.gate is not None:
        pairs["gate"] = (ours.shared_experts.gate.weight, theirs.shared_expert_gate.weight)
    with torch.no_grad():
        for mine, other in pairs.values():
            mine.copy_(other)
        if ours.router.e_score_correction_bias is not None:
            ours.router.e_score_correction_bias.copy_(theirs.gate.e_score_correction_bias)
    return pairs


@pytest.mark.parametrize("family", [glm, qwen2])
def test_a_layer_is_that_of_transformers(family: Any) -> None:
    """Outputs, and the gradients of the input and of every parameter."""
    theirs, settings = family()
    ours = mixture(model=GATED, **settings)
    pairs = take_over(ours, theirs)
    x, other = tokens(50).requires_grad_(), tokens(50).requires_grad_()
    made, expected = ours(x), theirs(other)
    if isinstance(expected, tuple):
        expected = expected[0]
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in ours.named_parameters()} == {
        name for name, one in ours.named_parameters() if any(one is mine for mine, _ in pairs.values())
    }
    found = torch.autograd.grad(made.square().mean(), [x, *(mine for mine, _ in pairs.values())])
    target = torch.autograd.grad(expected.square().mean(), [other, *theirs.parameters()], materialize_grads=True)
    torch.testing.assert_close(found[0], target[0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter, gradient in zip(theirs.parameters(), target[1:], strict=True):
            parameter.copy_(gradient)
    mine = dict(zip(pairs, found[1:], strict=True))
    again = take_over(mixture(model=GATED, **settings), theirs)
    target_of = {name: gradient for name, (_, gradient) in again.items()}
    torch.testing.assert_close(mine, target_of, rtol=1e-4, atol=1e-5)


def test_a_late_softmax_is_that_of_gpt_oss() -> None:
    config = GptOssConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=3)
    theirs = drawn(GptOssTopKRouter(config))
    logits, weights, experts = theirs(tokens(40).flatten(0, 1))
    found, chosen = topk(logits, 3, training=True, axis=ALONE, options=RouterOptions(pre_softmax=False))
    assert torch.equal(chosen, experts)
    torch.testing.assert_close(found, weights)


def test_groups_of_the_best_single_expert() -> None:
    """DeepSeek-V2's groups: their score is that of their best expert; the choice by a loop."""
    logits = torch.randn(64, EXPERTS, generator=torch.Generator().manual_seed(7))
    options = RouterOptions(groups=4, group_topk=2, group_experts=1)
    _, experts = topk(logits, 3, training=True, axis=ALONE, options=options)
    for row, chosen in zip(logits.tolist(), experts.tolist(), strict=True):
        best = sorted(range(4), key=lambda group: -max(row[2 * group : 2 * group + 2]))[:2]
        allowed = [number for number in range(EXPERTS) if number // 2 in best]
        assert chosen == sorted(allowed, key=lambda number: -row[number])[:3]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_biases_of_experts_are_added(activation: str) -> None:
    """In float64, token by token."""
    layer = mixture(torch.float64, model={"activation": activation}, moe_use_bias_in_experts=True)
    stack, x = drawn(layer).experts.mlp, tokens(20).double()
    width = stack.w1.shape[0] // 4
    expected = torch.zeros_like(x)
    with torch.no_grad():
        for number, token in enumerate(x[:, 0]):
            scores = (layer.router.layer.weight @ token).softmax(-1)
            for expert in scores.topk(2).indices.tolist():
                rows = slice(expert * width, (expert + 1) * width)
                inner = stack.w1[rows] @ token + stack.b1[rows]
                if stack.w3 is not None:
                    inner = torch.cat((stack.w3[rows] @ token + stack.b3[rows], inner))
                bias = stack.b2[expert * HIDDEN : (expert + 1) * HIDDEN]
                expected[number, 0] += scores[expert] * (ACTIVATIONS.load(activation)(inner) @ stack.w2[rows] + bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padded", [False, True])
def test_sequences_are_balanced_one_by_one(padded: bool) -> None:
    """Equations 17 to 20 of arXiv:2412.19437 in float64, for two sequences that use other experts."""
    generator = torch.Generator().manual_seed(8)
    scores = torch.rand(10, 2, 4, generator=generator, dtype=torch.float64)
    scores[:, 0, :2] += 1.0
    scores = scores / scores.sum(-1, keepdim=True)
    real = torch.ones(10, 2, dtype=torch.bool)
    if padded:
        real[6:, 1] = False
    expected = 0.0
    for sequence in range(2):
        rows = scores[:, sequence][real[:, sequence]]
        counts = rows.topk(2, dim=-1).indices.flatten().bincount(minlength=4)
        f = counts.double() * 4 / (2 * len(rows))
        expected += float((f * rows.mean(0)).sum()) / 2
    found = sequence_balance(scores.flatten(0, 1), 2, 2, ALONE, real.flatten() if padded else None)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert found.item() > 1.2


def micro_batches() -> list[Tensor]:
    return [tokens(30, seed) + offset for seed, offset in ((1, 0.5), (2, -0.5), (3, 0.1))]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_global_batch_counts_the_step_so_far(score: str) -> None:
    """Value and gradient of the third micro batch use the counts of all three; the next step begins at 0."""
    losses = RouterLossTracker(0.0, 0.0, of_global_batch=0.3)
    layer = mixture(losses=losses, moe_router_score_function=score)
    counts, values = torch.zeros(4), []
    for x in micro_batches():
        layer.zero_grad()
        (0 * layer(x).sum()).backward()
        found = layer.router.layer.weight.grad.clone()
        weight = layer.router.layer.weight.detach().clone().requires_grad_()
        logits = x.flatten(0, 1) @ weight.t()
        scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        counts += scores.topk(2, dim=-1).indices.flatten().bincount(minlength=4)
        fractions = scores / scores.sum(-1, keepdim=True)
        loss = 4 * (counts / counts.sum() * fractions.mean(0)).sum()
        (0.3 * loss).backward()
        torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-7)
        values.append(loss.item())
    reported = losses.take(Topology.single(), torch.device("cpu"))
    assert reported["moe_global_balance_loss"].item() == pytest.approx(sum(values) / 3, rel=1e-5)
    layer.update_bias(torch.tensor(False))
    assert layer.step_counts.total is None


def test_the_bias_follows_the_counts_of_a_step() -> None:
    """Once a step, against the sign of the counts over its micro batches; a skipped step leaves it."""
    layer = mixture(moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.01)
    counts, expected = torch.zeros(4), torch.zeros(4)
    for step in range(4):
        for x in micro_batches():
            scores = (x.flatten(0, 1) @ layer.router.layer.weight.t()).softmax(-1)
            counts += (scores + expected).topk(2, dim=-1).indices.flatten().bincount(minlength=4)
            layer(x).sum().backward()
            with torch.no_grad():
                layer(x)  # a forward pass that is recomputed counts once
        layer.update_bias(torch.tensor(step == 2))
        if step != 2:
            expected += 0.01 * torch.sign(counts.mean() - counts)
        counts.zero_()
        torch.testing.assert_close(layer.router.e_score_correction_bias, expected, rtol=0, atol=1e-7)
    assert expected.abs().max() >= 0.01
    assert "router.e_score_correction_bias" not in dict(layer.named_parameters())


def test_the_bias_keeps_full_precision() -> None:
    layer = mixture(moe_router_enable_expert_bias=True)
    layer.router.e_score_correction_bias += 1.001
    bias = layer.bfloat16().router.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert bias[0].item() == pytest.approx(1.001)
    assert layer.router.layer.weight.dtype == torch.bfloat16
