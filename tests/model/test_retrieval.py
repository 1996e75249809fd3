"""Embeddings equal those of transformers' DPR encoders, and the loss of two ranks is that of one process.

A wrong token, projection, order of encoders, gathered passage or gradient of one breaks these.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DPRConfig, DPRContextEncoder, DPRQuestionEncoder

from megatron.distributed.mesh import Axis, Topology
from megatron.model.loss_parts import LossParts
from megatron.model.retrieval_model import RetrievalModel
from megatron.objectives.retrieval import Retrieval, ranks_of, retrieval_parts
from tests.model.sections import build, disturb
from tests.model.test_masked_model import ENCODER, LAYERS, SETTINGS, batch, transformers_names, under_our_names
from tests.multi_rank import run_distributed

QUERIES, PASSAGES, WIDTH = 3, 6, 5
POST = {"norm_placement": "post", "embedding_norm": True}


def in_our_names(theirs: Any, tower: int) -> dict[str, torch.Tensor]:
    """Our name -> values of an encoder of transformers, as encoder number `tower` of ours."""
    values = {name.split(".", 1)[1].replace("bert_model", "bert"): each for name, each in theirs.named_parameters()}
    norms = {"attention_output_layernorm": "attention.output.LayerNorm", "mlp_output_layernorm": "output.LayerNorm"}
    names = {
        ours: name
        for ours, name in transformers_names().items()
        if not name.startswith(("cls.", "bert.pooler")) and ".ln." not in name
    }
    for kind in ("weight", "bias"):
        names |= {f"0.embedding_norm.{kind}": f"bert.embeddings.LayerNorm.{kind}"}
        names |= {f"{LAYERS + 4}.projection.{kind}": f"encode_proj.{kind}"}
        for block in range(LAYERS):
            names |= {f"{block + 2}.{a}.{kind}": f"bert.encoder.layer.{block}.{b}.{kind}" for a, b in norms.items()}
    found = under_our_names(values, names)
    split = {name: name.partition(".") for name in found}
    return {f"{int(split[name][0]) + tower * (LAYERS + 5)}.{split[name][2]}": found[name] for name in found}


def theirs_of(kind: Any) -> Any:
    torch.manual_seed(7)
    model = kind(DPRConfig(**SETTINGS, projection_dim=WIDTH)).eval()
    disturb(model)
    return model


def given(rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [q + p, 4], labels and loss mask [q + p, 1] of a rank, or of one process with all of them."""
    generator = torch.Generator().manual_seed(3)
    queries, passages = (
        torch.randn(2, count, 4, generator=generator, dtype=torch.float64) for count in (QUERIES, PASSAGES)
    )
    labels = torch.arange(0, PASSAGES, 2)
    real = torch.ones(2, PASSAGES, dtype=torch.long)
    real[0, 1] = 0  # padding
    if ranks == 1:
        own = torch.cat((queries.flatten(0, 1), passages.flatten(0, 1)))
        return own, torch.cat((labels, labels + PASSAGES, real.flatten()))[:, None], mask(2)
    return torch.cat((queries[rank], passages[rank])), torch.cat((labels, real[rank]))[:, None], mask(1)


def mask(ranks: int) -> torch.Tensor:
    return torch.cat((torch.ones(ranks * QUERIES, 1), torch.zeros(ranks * PASSAGES, 1)))


def loss_and_gradient(rank: int, world_size: int) -> tuple[float, list[float], dict[str, float]]:
    """The mean over ranks of losses and gradients, as an engine makes it."""
    import torch.distributed as dist

    group = dist.group.WORLD if world_size > 1 else None
    axis = Axis("data", world_size, rank, tuple(range(world_size)), group)
    features, labels, counted = given(rank, world_size)
    generator = torch.Generator().manual_seed(9)
    towers = torch.randn(2, 4, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    split = len(labels) * QUERIES // (QUERIES + PASSAGES)
    embeddings = torch.cat((features[:split] @ towers[0], features[split:] @ towers[1]))
    parts: LossParts = retrieval_parts((1, 2))
    objective = Retrieval(split, axis, scale=0.5, tops=(1, 2), parts=parts)
    tokens = torch.tensor(2.0 * QUERIES, dtype=torch.float64) / world_size
    loss = objective.loss(embeddings, labels, counted, Topology.single().model, tokens=tokens)
    loss.backward()
    found = torch.cat((loss.detach()[None], towers.grad.flatten() if towers.grad is not None else loss[None]))
    noted = torch.stack([parts._sums[name] for name in ("top1_accuracy", "top2_accuracy", "average_rank")])
    if world_size > 1:
        dist.all_reduce(found)
        dist.all_reduce(noted)
    value, *gradient = (found / world_size).tolist()
    return value, gradient, dict(zip(("top1", "top2", "rank"), noted.tolist(), strict=True))


def test_two_ranks_are_one_process_in_float64() -> None:
    both = run_distributed(loss_and_gradient, 2)
    alone = loss_and_gradient(0, 1)
    for found in both:
        assert found[0] == pytest.approx(alone[0], rel=1e-12)
        assert found[1] == pytest.approx(alone[1], rel=1e-12)
        assert found[2] == alone[2]
    features, labels, _ = given(0, 1)
    towers = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    total = 0.0  # the definition, a query at a time
    real = [row for row in range(2 * PASSAGES) if labels[2 * QUERIES + row] > 0]
    for query in range(2 * QUERIES):
        vector = features[query] @ towers[0]
        scores = {row: float(vector @ (features[2 * QUERIES + row] @ towers[1])) / 2 for row in real}
        total -= scores[int(labels[query])] - float(torch.logsumexp(torch.tensor([*scores.values()]), 0))
    assert alone[0] == pytest.approx(total / (2 * QUERIES), rel=1e-7)


def test_ranks_count_equal_passages_as_better() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 5.0, 2.0]])
    assert ranks_of(scores, torch.tensor([0, 1, 0])).tolist() == [0, 2, 2]


@pytest.mark.parametrize("towers", [1, 2])
def test_embeddings_equal_transformers(towers: int) -> None:
    data, kinds = batch(), (DPRQuestionEncoder, DPRContextEncoder)
    head = {"lm_head": "retrieval", "retrieval_shared_encoder": towers == 1, "retrieval_projection_size": WIDTH}
    made: Any = build(reset_attention=True, **{**ENCODER, **head, **POST})
    ours = RetrievalModel([], towers, 1)
    ours.sequential = made.sequential
    parameters = {name.removeprefix("sequential."): each for name, each in ours.named_parameters()}
    expected = []
    for tower in range(towers):
        theirs = theirs_of(kinds[tower])
        with torch.no_grad():
            for name, value in in_our_names(theirs, tower).items():
                parameters[name].copy_(value)
        output = theirs(
            input_ids=data["tokens"], token_type_ids=data["types"], attention_mask=data["real"]
        ).pooler_output  # fmt: skip
        expected.append(output)
    rows = torch.cat((expected[0][:1], expected[-1][1:]))
    ours.eval()
    found = ours(torch.stack((data["tokens"], data["types"])), None, data["starts"])
    torch.testing.assert_close(found, rows, rtol=1e-5, atol=1e-5)
