"""The whole model cut over ranks: the same initial bits, logits, loss and gradients as on one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.distributed.collectives import all_gather_last
from megatron.distributed.mesh import Axis, Topology
from megatron.model.kv_cache import KVCache
from megatron.objectives.language_model import LanguageModel
from megatron.param_table import ModelDims, tensors
from tests.model.sections import LLAMA, VOCABULARY, build, disturb, model_section
from tests.multi_rank import run_cases, run_distributed

OPTIONS: dict[str, dict[str, object]] = {
    "neox": {"gpt_j_residual": True},
    "gpt": {"pos_emb": "learned", "no_weight_tying": False},
    "llama": {**LLAMA, "num_attention_heads": 8, "num_kv_heads": 4, "kv_channels": 8},
    "two key heads": {**LLAMA, "num_attention_heads": 8, "num_kv_heads": 2, "kv_channels": 8, "use_qk_layernorm": True},
    "one key head": {"num_attention_heads": 4, "num_kv_heads": 1, "pos_emb": "alibi"},
}
SIZES = (2, 4)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(0, VOCABULARY, (2, 25), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 24)
    mask[:, :3] = 0
    return ids[:, :-1], ids[:, 1:], mask


def local(full: dict[str, Tensor], options: dict[str, object], rank: int, size: int) -> dict[str, Tensor]:
    """The slices of the full tensors that a rank holds, by the shape table."""
    cut = {}
    for shape in tensors(ModelDims.of(model_section(**options)), VOCABULARY):
        value = full[f"sequential.{shape.layer}.{shape.name}"]
        if shape.shard_dim is not None:
            parts = [value.narrow(shape.shard_dim, start, stop - start) for start, stop in shape.slices(rank, size)]
            value = torch.cat(parts, dim=shape.shard_dim)
        cut[f"sequential.{shape.layer}.{shape.name}"] = value
    return cut


def one_rank(options: dict[str, object]) -> dict[str, object]:
    """Initial values, logits, loss and gradients of the whole model."""
    model = build(std=0.1, **options)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    disturb(model)
    ids, labels, mask = batch()
    logits = model(ids)
    seen = logits.detach().clone()
    loss = LanguageModel().loss(logits, labels, mask, Topology.single().model, tokens=mask.sum())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"initial": initial, "model": model, "logits": seen, "loss": loss.item(), "gradients": gradients}


def cut_model(rank: int, size: int, options: dict[str, object], values: dict[str, Tensor]) -> dict[str, object]:
    shared = -(-size // model_section(**options).num_kv_heads)
    topology = Topology.build(pipe=1, model=size, rank=rank, world_size=size, key_head=shared)
    model = build(topology, std=0.1, **options)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(local(values, options, rank, size))
    ids, labels, mask = batch()
    logits = model(ids)
    seen = all_gather_last(logits.detach(), topology.model)
    loss = LanguageModel().loss(logits, labels, mask, topology.model, tokens=mask.sum())
    loss.backward()
    cached = cached_logits(model, ids, options, topology.model)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"initial": initial, "logits": seen, "loss": loss.item(), "gradients": gradients, "cached": cached}


def cached_logits(model: torch.nn.Module, ids: Tensor, options: dict[str, object], axis: Axis) -> Tensor:
    section = model_section(**options)
    cache = KVCache(2, 2, max(1, section.num_kv_heads // axis.size), 24, section.kv_channels)
    with torch.no_grad():
        parts = [model(ids[:, :20], cache), *(model(ids[:, i : i + 1], cache) for i in range(20, 24))]
    return all_gather_last(torch.cat(parts), axis)


@pytest.fixture(scope="module")
def full() -> dict[str, dict[str, Any]]:
    """The models on one rank."""
    return {name: one_rank(options) for name, options in OPTIONS.items()}


@pytest.fixture(scope="module")
def cut(full: dict[str, dict[str, Any]]) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """Ranks -> model -> what each rank computed."""
    cases = {
        name: (cut_model, options, {key: value.detach() for key, value in full[name]["model"].state_dict().items()})
        for name, options in OPTIONS.items()
    }
    return {size: run_cases(cases, size) for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_cut_model_equals_the_full_one(
    name: str, size: int, full: dict[str, dict[str, Any]], cut: dict[int, dict[str, list[dict[str, Any]]]]
) -> None:
    complete, options = full[name], OPTIONS[name]
    for rank, got in enumerate(cut[size][name]):
        for name, value in local(complete["initial"], options, rank, size).items():
            assert torch.equal(got["initial"][name], value), name
        torch.testing.assert_close(got["logits"], complete["logits"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["cached"], complete["logits"], rtol=1e-5, atol=1e-5)
        assert got["loss"] == pytest.approx(complete["loss"], rel=1e-6)
        for name, gradient in local(complete["gradients"], options, rank, size).items():
            torch.testing.assert_close(
                got["gradients"][name], gradient, rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}"
            )


def dropped(rank: int, size: int) -> tuple[Tensor, Tensor]:
    """Logits with dropout on the residual (must agree between ranks) and on the attention weights (must not)."""
    topology = Topology.build(pipe=1, model=size, rank=rank, world_size=size)
    ids, _, _ = batch()
    torch.manual_seed(8)
    model = build(topology, std=0.1, hidden_dropout=0.5)
    hidden = ids
    for layer in model.sequential[:-1]:
        hidden = layer(hidden)
    heads = build(topology, std=0.1, attention_dropout=0.5).sequential[2].attention
    retained = heads.attend  # the weights' dropout is seen through values of 1
    with heads.draws():
        q = torch.zeros(1, heads.heads, 24, 16)
        weights = retained(q, q, torch.ones_like(q), 0.5)
    return hidden.detach(), weights


def test_dropout_agrees_where_ranks_hold_the_same_and_differs_where_they_do_not() -> None:
    (first_hidden, first), (second_hidden, second) = run_distributed(dropped, 2)
    assert torch.equal(first_hidden, second_hidden)
    assert not torch.equal(first, second)


def test_heads_that_do_not_divide_are_refused() -> None:
    axis = Axis("model", 4, 0, (0, 1, 2, 3))
    single = Topology.single()
    topology = replace(single, world_size=4, model=axis)
    with pytest.raises(ValueError, match="3 key/value heads do not divide by 4"):
        build(topology, **LLAMA, num_attention_heads=12, num_kv_heads=3, kv_channels=8)
    with pytest.raises(ValueError, match="a key head is shared by 2 ranks, and the topology has groups of 1"):
        build(topology, **LLAMA, num_kv_heads=2)
