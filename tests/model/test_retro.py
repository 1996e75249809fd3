"""Logits, losses and gradients of a model with neighbours equal a loop over chunks in float64.

A chunk that attends to its own neighbours too early, a neighbour of another chunk or sample, an encoder without the
chunk, or a shift of the attending tokens by one breaks these.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from tests.model.retro import BATCH, CHUNK, CHUNKS, KEYS, LENGTH, NEIGHBOR, NEIGHBORS, Loop
from tests.model.sections import VOCABULARY, build, disturb


def model() -> nn.Module:
    """With norms and biases away from their initial values."""
    ours = build(**KEYS, std=0.1)
    disturb(ours)
    return ours


def tokens() -> tuple[Tensor, Tensor]:
    """Neighbours [b, l, k, r] and texts [b, s]."""
    generator = torch.Generator().manual_seed(7)
    neighbors = torch.randint(0, VOCABULARY, (BATCH, CHUNKS, NEIGHBORS, NEIGHBOR), generator=generator)
    return neighbors, torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)


def together(neighbors: Tensor, texts: Tensor) -> Tensor:
    return torch.cat((neighbors.flatten(1), texts), dim=1)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("sequential."): value for name, value in module.named_parameters()}


def test_logits_losses_and_gradients_equal_a_loop_over_chunks() -> None:
    ours, (neighbors, texts) = model(), tokens()
    copies = {name: value.detach().double().requires_grad_() for name, value in weights_of(ours).items()}
    loop = Loop(copies)
    expected = torch.stack([loop.logits(text, of) for text, of in zip(texts, neighbors, strict=True)])  # [b, s, v]
    with torch.no_grad():
        found = ours(together(neighbors, texts)).transpose(0, 1)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    labels = texts.roll(-1, dims=1)
    mean = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    mean.backward()
    loss = ours(
        together(neighbors, texts), targets=TokenTargets(labels.t(), torch.full((LENGTH, BATCH), 1 / labels.numel()))
    )
    assert float(loss.detach()) == pytest.approx(float(mean.detach()), rel=1e-6)
    loss.backward()
    for name, parameter in weights_of(ours).items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad.double(), copies[name].grad, rtol=1e-4, atol=1e-6, msg=partial("{}: {}".format, name)
        )


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_other_neighbors_change_nothing_before_the_end_of_their_chunk(chunk: int) -> None:
    ours, (neighbors, texts) = model().eval(), tokens()
    other = neighbors.clone()
    other[:, chunk] = (other[:, chunk] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = (ours(together(each, texts)) for each in (neighbors, other))
    last = (chunk + 1) * CHUNK - 1
    assert torch.equal(before[:last], after[:last])
    assert all(not torch.equal(a, b) for a, b in zip(before[last:], after[last:], strict=True))


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, 2 * CHUNK + 3])
def test_a_shorter_text_has_the_logits_of_a_longer_one(length: int) -> None:
    """Only whole chunks have neighbours, so what follows the last one changes nothing before."""
    ours, (neighbors, texts) = model().eval(), tokens()
    with torch.no_grad():
        full = ours(together(neighbors, texts))
        part = ours(together(neighbors[:, : length // CHUNK], texts[:, :length]))
    torch.testing.assert_close(part, full[:length], rtol=1e-5, atol=1e-5)


def test_without_what_it_adds_it_is_the_model_without_retrieval() -> None:
    """Bit by bit, where the output layers of cross attention are 0."""
    ours, (neighbors, texts) = model().eval(), tokens()
    plain = build(**{**KEYS, "retro_add_retriever": False}).eval()
    weights = weights_of(ours)
    with torch.no_grad():
        for name, parameter in weights_of(plain).items():
            parameter.copy_(weights[name])
        for block in KEYS["retro_cross_attention_layers"]:  # type: ignore[attr-defined]
            for part in ("weight", "bias"):
                weights[f"{block + 2}.cross_attention.dense.{part}"].zero_()
        assert torch.equal(ours(together(neighbors, texts)), plain(texts))
