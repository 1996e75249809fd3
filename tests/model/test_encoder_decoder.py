"""Logits, losses and gradients of an encoder-decoder equal those of transformers' T5ForConditionalGeneration.

A wrong bucket of distance, mask of padding, row of a joint matrix, norm between the stacks, factor of the logits or
share of the cross attention breaks these.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from megatron.distributed.tensor_parallel.linear_cross_entropy import TokenTargets
from megatron.kernels.padded_attention import attention_to, encoder_attention
from tests.model.sections import VOCABULARY, build
from tests.model.t5 import FORMS, PUBLIC, SOURCE, TARGET, ours_with, transformers_t5, under_our_names

LENGTHS = (24, 17, 9)


def batch() -> dict[str, Tensor]:
    """Rows whose sources and targets have different lengths."""
    generator = torch.Generator().manual_seed(9)
    source = torch.randint(1, VOCABULARY, (3, SOURCE), generator=generator)
    target = torch.randint(1, VOCABULARY, (3, TARGET), generator=generator)
    real = torch.arange(SOURCE) < torch.tensor(LENGTHS)[:, None]
    starts = torch.where(real, 0, torch.tensor(LENGTHS)[:, None])
    return {
        "source": source * real,
        "target": torch.cat((torch.zeros(3, 1, dtype=torch.long), target[:, :-1]), dim=1),
        "labels": target,
        "mask": (torch.arange(TARGET) < torch.tensor([10, 4, 7])[:, None]).float(),
        "real": real.long(),
        "starts": torch.cat((starts, torch.full((3, TARGET), SOURCE)), dim=1),
    }


@pytest.mark.parametrize("form", FORMS)
def test_logits_losses_and_gradients_equal_t5(form: str) -> None:
    theirs, given = transformers_t5(form), batch()
    ours = ours_with(theirs, form)
    tokens = torch.cat((given["source"], given["target"]), dim=1)
    with torch.no_grad():
        logits = ours(tokens, None, given["starts"]).transpose(0, 1)
    labels = given["labels"].masked_fill(given["mask"] == 0, -100)
    output = theirs(
        input_ids=given["source"], attention_mask=given["real"], decoder_input_ids=given["target"], labels=labels
    )
    torch.testing.assert_close(logits, output.logits, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    expected = under_our_names({name: each.grad for name, each in theirs.named_parameters()}, form)

    targets = TokenTargets(given["labels"].t(), given["mask"].t() / given["mask"].sum())
    loss = ours(tokens, None, given["starts"], targets)
    assert float(loss.detach()) == pytest.approx(float(output.loss.detach()), rel=1e-6)
    loss.backward()
    found = {name.removeprefix("sequential."): each.grad for name, each in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("positions", ["learned", "rotary", "relative"])
def test_padding_and_later_tokens_are_not_seen(positions: str) -> None:
    """Other padding leaves all logits bit-equal; another token of the decoder changes those from it on, and one of the
    encoder all of them.
    """
    ours = build(**{**PUBLIC, "pos_emb": positions}).eval()
    given = batch()
    tokens = torch.cat((given["source"], given["target"]), dim=1)

    def logits(row: int, at: int) -> Tensor:
        changed = tokens.clone()
        changed[row, at] += 1
        with torch.no_grad():
            return ours(changed, None, given["starts"])[:, row]

    with torch.no_grad():
        first = ours(tokens, None, given["starts"])[:, 1]
    assert torch.equal(logits(1, LENGTHS[1]), first)
    later = logits(1, SOURCE + 5)
    assert torch.equal(later[:5], first[:5])
    assert not torch.isclose(later[5:], first[5:], atol=0).all(dim=1).any()
    assert not torch.isclose(logits(1, 3), first, atol=0).all(dim=1).any()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_equals_the_formula(biased: bool, kv_heads: int) -> None:
    """float64 softmax over the keys that are not padding, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    q = draw(2, 4, 9, 8).requires_grad_()
    k, v = (draw(2, kv_heads, 9, 8).requires_grad_() for _ in range(2))
    bias = draw(4, 9, 9).requires_grad_() if biased else None
    lengths = torch.tensor([9, 5])
    shown = torch.arange(9) < lengths[:, None]
    scores = q @ k.repeat_interleave(4 // kv_heads, 1).transpose(-1, -2) / 8**0.5
    scores = scores if bias is None else scores + bias
    hidden = scores.masked_fill(~shown[:, None, None], float("-inf"))
    expected = hidden.softmax(-1) @ v.repeat_interleave(4 // kv_heads, 1)
    real = shown[:, None, :, None]
    starts = torch.where(shown, 0, lengths[:, None])
    inputs = (q, k, v) if bias is None else (q, k, v, bias)
    for found in (attention_to(q, k, v, 0.0, shown, bias), encoder_attention(q, k, v, 0.0, starts, bias)):
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if biased else {}  # scores are in fp32 then
        torch.testing.assert_close(found * real, expected * real, **tolerance)
        weights = draw(expected.shape) * real
        gradients = torch.autograd.grad(expected, inputs, weights, retain_graph=True)
        for one, other in zip(torch.autograd.grad(found, inputs, weights), gradients, strict=True):
            torch.testing.assert_close(one, other, **tolerance)
