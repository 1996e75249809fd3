"""Modules that predict further tokens: their tensors, what they leave alone, which tokens have a loss.

tests/checkpoint/huggingface/test_further_tokens.py compares their training with transformers' class in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.config import Resources, resolve
from megatron.distributed.mesh import Topology
from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.model.layers import build_layer_specs
from megatron.model.loss_parts import LossParts
from megatron.model.model_spec import ModelSpec
from megatron.model.multi_token import FurtherLosses, part_name, same_document, shifted
from megatron.model.sequential_model import SequentialModel
from megatron.param_table import ModelDims, tensors
from megatron.plan import make_plan
from megatron.plan.flops import flops_per_iteration

VOCABULARY, LENGTH = 64, 20
BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": LENGTH,
    "pos_emb": "rotary",
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 1,
    "init_method_std": 0.1,
}
EXPERTS = {"moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": "topk", "no_weight_tying": True, "norm": "rmsnorm"}


def build(modules: int | None, factor: float = 0.3, **changes: Any) -> tuple[SequentialModel, ModelDims, LossParts]:
    config = resolve([], {**BASE, **changes, "mtp_num_layers": modules}, Resources(1)).config
    spec = ModelSpec(
        config.model,
        config.initialization,
        config.kernels,
        padded_vocab_size=VOCABULARY,
        topology=Topology.single(),
        seed=3,
        dtype=torch.float32,
        device=torch.device("cpu"),
        moe=config.moe,
        reset_attention=True,
    )
    parts = LossParts(tuple(part_name(depth + 1) for depth in range(modules or 0)))
    model = SequentialModel(build_layer_specs(spec), None, FurtherLosses(factor, parts))
    return model, ModelDims.of(config.model, config.moe), parts


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def targets(weights: Tensor | None = None) -> TokenTargets:
    weights = torch.ones(LENGTH, 2) / (2 * LENGTH) if weights is None else weights
    return TokenTargets(tokens()[:, 1:].t(), weights)


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["tied", "experts"])
def test_the_table_is_exact_and_everything_learns(changes: dict[str, Any]) -> None:
    model, dims, _ = build(2, **changes)
    table = {f"sequential.{shape.layer}.{shape.name}": shape.shape for shape in tensors(dims, VOCABULARY)}
    assert {key: tuple(parameter.shape) for key, parameter in model.named_parameters()} == table
    model(tokens()[:, :-1], targets=targets()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["tied", "experts"])
def test_a_weight_of_0_leaves_the_gradients_of_the_model_alone(changes: dict[str, Any]) -> None:
    def gradients(modules: int | None) -> dict[str, Tensor]:
        model, dims, _ = build(modules, 0.0, **changes)
        model(tokens()[:, :-1], targets=targets()).backward()
        last = dims.num_layers + 4
        named = model.named_parameters()
        return {key: one.grad for key, one in named if one.grad is not None and int(key.split(".")[1]) <= last}

    plain, beside = gradients(None), gradients(2)
    assert plain.keys() == beside.keys()
    for key, gradient in plain.items():
        assert torch.equal(gradient, beside[key]), key


def test_a_module_sees_the_tokens_before_its_target_and_no_other() -> None:
    """The loss of one position and depth changes with tokens up to its target, and not with later ones."""
    model, _, parts = build(1)
    at = 7
    weights = torch.zeros(LENGTH, 2)
    weights[at + 1, 0] = 1.0  # of the label that position `at` predicts, the token at + 2

    def loss(changed: int | None) -> float:
        text = tokens()
        if changed is not None:
            text[0, changed] = (text[0, changed] + 1) % VOCABULARY
        model(text[:, :-1], targets=TokenTargets(text[:, 1:].t(), weights))
        return float(parts.take(Topology.single(), torch.device("cpu"))["mtp_1_loss"])

    plain = loss(None)
    for position in (0, at, at + 1, at + 2):
        assert loss(position) != plain, position
    assert loss(at + 3) == plain
    assert loss(LENGTH) == plain


def test_documents_learn_from_themselves_alone() -> None:
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3], [0, 0, 0, 0, 0, 5, 5]])
    ones = torch.ones(7, 2)
    first = [[1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1, 0]]
    second = [[1, 0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    assert same_document(starts, 1, ones).t().tolist() == first
    assert same_document(starts, 2, ones).t().tolist() == second
    assert shifted(torch.arange(4)[:, None], 2).flatten().tolist() == [2, 3, 0, 0]


def test_texts_of_one_document_each_are_as_they_are_alone() -> None:
    """Two documents in a row have the losses of both alone, whose last position has no further token."""
    model, _, parts = build(1)
    text = tokens()[:1]
    cut = 8

    def total(part: Tensor, document_starts: Tensor | None, weights: Tensor) -> float:
        model(part[:, :-1], None, document_starts, TokenTargets(part[:, 1:].t(), weights[:, None]))
        return float(parts.take(Topology.single(), torch.device("cpu"))["mtp_1_loss"])

    starts = torch.cat((torch.zeros(1, cut), torch.full((1, LENGTH - cut), cut)), 1).long()
    together = total(text, starts, torch.ones(LENGTH))
    alone = total(text[:, : cut + 1], None, torch.ones(cut)) + total(text[:, cut:], None, torch.ones(LENGTH - cut))
    assert together == pytest.approx(alone, rel=1e-5)


def test_flops_and_parameters_of_the_plan() -> None:
    """A module has a projection of 2 h x h, three norms, a block and the output layer once more."""
    plans = []
    for count in (None, 2):
        keys = {**BASE, "padded_vocab_size": VOCABULARY, "mtp_num_layers": count}
        resolution = resolve([], keys, Resources(1))
        dims = ModelDims.of(resolution.config.model, resolution.config.moe)
        table = tensors(dims, VOCABULARY)
        found = flops_per_iteration(dims, table, seq_length=LENGTH, train_batch_size=1)
        plans.append((make_plan(resolution).parameters, found, table, make_plan(resolution).memory))
    (plain, flops, table, memory), (more, further, _, larger) = plans
    block = [shape for shape in table if shape.layer == 3]
    h = dims.hidden_size
    assert more - plain == 2 * (2 * h * h + 3 * 2 * h + sum(shape.count for shape in block))
    products = 2 * h * h + sum(shape.count for shape in block if shape.kind == "weight") + VOCABULARY * h
    assert further - flops == 2 * LENGTH * (6 * products + 3 * 4 * LENGTH * h)
    assert memory is not None
    assert larger is not None
    assert larger.activations > 1.5 * memory.activations
