"""Documents kept apart in one sequence: each gives the logits it gives when it is run alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.kernels import attention
from megatron.model.sequential_model import SequentialModel
from tests.model.sections import LLAMA, VOCABULARY, build, disturb

MODELS = {
    "rotary": {},
    "learned": {"pos_emb": "learned", "no_weight_tying": False},
    "none": {"pos_emb": "none", "gpt_j_residual": True},
    "llama": {**LLAMA, "num_kv_heads": 2},
}
LENGTHS = ((20, 1, 30, 9), (1, 1, 58))  # of the documents in each of two sequences of 60


def starts_of(lengths: tuple[tuple[int, ...], ...]) -> Tensor:
    rows = []
    for row in lengths:
        ends = torch.tensor(row).cumsum(0)
        rows.append(torch.repeat_interleave(ends - torch.tensor(row), torch.tensor(row)))
    return torch.stack(rows)


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(seed))


def made(name: str, **changes: object) -> SequentialModel:
    model = build(std=0.1, **{**MODELS[name], **changes})
    disturb(model)
    return model


def alone(model: SequentialModel, tokens: Tensor) -> Tensor:
    """The logits of every document in a call of its own, put together, [s, b, v]."""
    columns = []
    for row, lengths in zip(tokens, LENGTHS, strict=True):
        columns.append(torch.cat([model(part[None]) for part in row.split(lengths)]))  # [s, 1, v]
    return torch.cat(columns, dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_each_document_is_as_it_is_alone(name: str) -> None:
    model, full = made(name, reset=True), made(name)
    together = model(ids(), None, starts_of(LENGTHS))
    torch.testing.assert_close(together, alone(full, ids()), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, full(ids()), atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_too(name: str) -> None:
    model, full = made(name, reset=True), made(name)
    model(ids(), None, starts_of(LENGTHS)).square().mean().backward()
    alone(full, ids()).square().mean().backward()
    for (key, first), second in zip(model.named_parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(
            first.grad, second.grad, rtol=1e-4, atol=1e-6, msg=lambda reported, key=key: f"{key}: {reported}"
        )


@pytest.mark.parametrize("kernel", ["plain_attention", "sdpa_attention"])
def test_with_every_attention_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "megatron.model.model_spec.load_attention",
        lambda facts, kinds, section: dict.fromkeys(kinds, getattr(attention, kernel)),
    )
    test_each_document_is_as_it_is_alone("llama")


def test_positions_alone_leave_attention_full() -> None:
    """Learned positions start again, and what came before is still seen."""
    model = made("learned", reset_positions=True)
    starts = starts_of(LENGTHS)
    changed = ids()
    changed[:, 0] = (changed[:, 0] + 1) % VOCABULARY
    with torch.no_grad():
        first, second = model(ids(), None, starts), model(changed, None, starts)
        assert not torch.allclose(first[-1], second[-1])
        # A model whose table holds the same vector at every position cannot tell where documents start.
        model.sequential[0].position_embeddings.weight[:] = 0.5
        torch.testing.assert_close(model(ids(), None, starts), model(ids()), rtol=1e-5, atol=1e-6)


def test_attention_alone_leaves_positions_full() -> None:
    model, full = made("learned", reset_attention=True), made("learned")
    starts = starts_of(LENGTHS)
    changed = ids()
    changed[:, 0] = (changed[:, 0] + 1) % VOCABULARY
    first, second = model(ids(), None, starts), model(changed, None, starts)
    torch.testing.assert_close(first[20:, 0], second[20:, 0], rtol=0, atol=0)
    assert not torch.allclose(first[1:20, 0], second[1:20, 0])
    later = alone(full, ids())
    torch.testing.assert_close(first[:20, 0], later[:20, 0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first[21:, 0], later[21:, 0], atol=1e-2)


def test_without_documents_nothing_changes() -> None:
    torch.testing.assert_close(made("llama", reset=True)(ids()), made("llama")(ids()), rtol=0, atol=0)
