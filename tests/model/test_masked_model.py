"""Logits, losses and gradients of a masked language model equal those of transformers' MegatronBertForPreTraining.

A wrong mask of padding, token type, position, head, tied matrix or normalization of a loss breaks these.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import MegatronBertConfig, MegatronBertForPreTraining

from megatron.data.dataset.document_starts import document_starts
from megatron.distributed.mesh import Topology
from megatron.kernels.attention import plain_attention
from megatron.kernels.bidirectional_attention import bidirectional_attention, document_attention
from megatron.model.loss_parts import LossParts
from megatron.model.sequential_model import SequentialModel
from megatron.objectives.masked_language_model import MaskedLanguageModel
from tests.model.sections import VOCABULARY, build, disturb

BATCH, LENGTH, LAYERS, HEADS, HIDDEN = 3, 24, 2, 4, 64
LENGTHS = (24, 17, 9)
ENCODER = {
    "attention_mask": "bidirectional",
    "lm_head": "masked",
    "bert_binary_head": True,
    "num_token_types": 2,
    "no_weight_tying": False,
    "pos_emb": "learned",
    "max_position_embeddings": 32,
    "seq_length": LENGTH,
}

SETTINGS = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 176,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.1,
}


def transformers_names() -> dict[str, str]:
    """Our name -> transformers' name of the tensors that are the same."""
    last, head = LAYERS + 3, LAYERS + 4
    names = {
        "0.word_embeddings.weight": "bert.embeddings.word_embeddings.weight",
        "0.position_embeddings.weight": "bert.embeddings.position_embeddings.weight",
        "0.tokentype_embeddings.weight": "bert.embeddings.token_type_embeddings.weight",
        f"{head}.bias": "cls.predictions.bias",
    }
    modules = {
        f"{last}.norm": "bert.encoder.ln",
        f"{head}.lm_head.dense": "cls.predictions.transform.dense",
        f"{head}.lm_head.layernorm": "cls.predictions.transform.LayerNorm",
        f"{head}.pooler": "bert.pooler.dense",
        f"{head}.binary_head": "cls.seq_relationship",
    }
    for block in range(LAYERS):
        theirs = f"bert.encoder.layer.{block}."
        modules |= {
            f"{block + 2}.input_layernorm": f"{theirs}attention.ln",
            f"{block + 2}.attention.dense": f"{theirs}attention.output.dense",
            f"{block + 2}.post_attention_layernorm": f"{theirs}ln",
            f"{block + 2}.mlp.linear1": f"{theirs}intermediate.dense",
            f"{block + 2}.mlp.linear2": f"{theirs}output.dense",
        }
    return names | {f"{a}.{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}


def under_our_names(theirs: dict[str, Tensor], names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Tensors of transformers, parameters or gradients, with queries, keys and values head by head.

    names: our name -> theirs of the others; those of the masked language model unless given.
    """
    found = {ours: theirs[name] for ours, name in (names or transformers_names()).items()}
    for block in range(LAYERS):
        for kind in ("weight", "bias"):
            parts = [
                theirs[f"bert.encoder.layer.{block}.attention.self.{name}.{kind}"].unflatten(0, (HEADS, -1))
                for name in ("query", "key", "value")
            ]
            found[f"{block + 2}.attention.query_key_value.{kind}"] = torch.stack(parts, dim=1).flatten(0, 2)
    return found


@pytest.fixture(scope="module")
def theirs() -> MegatronBertForPreTraining:
    torch.manual_seed(3)
    config = MegatronBertConfig(**SETTINGS)
    model = MegatronBertForPreTraining(config).train()
    disturb(model)
    return model


def ours_with(theirs: MegatronBertForPreTraining, parts: LossParts | None = None) -> SequentialModel:
    model = build(reset_attention=True, parts=parts, **ENCODER)
    source = under_our_names(dict(theirs.named_parameters()))
    target = {name.removeprefix("sequential."): parameter for name, parameter in model.named_parameters()}
    assert set(source) == set(target)
    with torch.no_grad():
        for name, value in source.items():
            target[name].copy_(value)
    return model


def batch() -> dict[str, Tensor]:
    """Rows of different lengths with two segments, some tokens of which are to be predicted."""
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=generator)
    real = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    chosen = (torch.rand(BATCH, LENGTH, generator=generator) < 0.3) & real
    borders = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        borders[row, length % LENGTH] = True
    return {
        "tokens": tokens * real,
        "types": ((torch.arange(LENGTH) >= 6) & real).long(),
        "labels": torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator) * chosen,
        "mask": chosen.float(),
        "real": real.long(),
        "starts": document_starts(tokens, borders, None),
        "order": torch.tensor([[1], [0], [1]]),
    }


def test_logits_losses_and_gradients_equal_megatron_bert(theirs: MegatronBertForPreTraining) -> None:
    parts = LossParts()
    ours, given = ours_with(theirs, parts), batch()
    inputs = torch.stack((given["tokens"], given["types"]))
    with torch.no_grad():
        logits = ours(inputs, None, given["starts"]).transpose(0, 1)
    labels = given["labels"].masked_fill(given["mask"] == 0, -100)
    output = theirs(
        input_ids=given["tokens"], token_type_ids=given["types"], attention_mask=given["real"],
        labels=labels, next_sentence_label=given["order"].flatten(),
    )  # fmt: skip
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(logits[row, :length], output.prediction_logits[row, :length], rtol=1e-5, atol=1e-5)
    output.loss.backward()
    expected = under_our_names({name: each.grad for name, each in theirs.named_parameters() if each.grad is not None})

    targets = MaskedLanguageModel().targets(
        given["labels"], given["mask"], tokens=given["mask"].sum(), vocabulary=None, order=given["order"]
    )
    loss = ours(inputs, None, given["starts"], targets)
    assert float(loss.detach()) == pytest.approx(float(output.loss.detach()), rel=1e-6)
    loss.backward()
    of_order = torch.nn.functional.cross_entropy(output.seq_relationship_logits, given["order"].flatten())
    noted = parts.take(build_topology(), torch.device("cpu"))
    assert float(noted["sop_loss"]) == pytest.approx(float(of_order.detach()), rel=1e-6)
    found = {name.removeprefix("sequential."): each.grad for name, each in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=partial("{}: {}".format, name))


def build_topology() -> Topology:
    return Topology.single()


def test_evaluation_leaves_the_order_out_of_the_sum(theirs: MegatronBertForPreTraining) -> None:
    """The tokens' loss is divided by their number, and that of the order is a mean of its own."""
    parts = LossParts()
    ours, given = ours_with(theirs, parts).eval(), batch()
    targets = MaskedLanguageModel().targets(
        given["labels"], given["mask"], tokens=torch.ones(()), vocabulary=None, order=given["order"]
    )
    with torch.no_grad():
        total = ours(torch.stack((given["tokens"], given["types"])), None, given["starts"], targets)
        logits = theirs(given["tokens"], given["real"], given["types"]).prediction_logits
    chosen = given["mask"] == 1
    expected = torch.nn.functional.cross_entropy(logits[chosen], given["labels"][chosen], reduction="sum")
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    assert float(parts.take(build_topology(), torch.device("cpu"))["sop_loss"]) > 0


@pytest.mark.parametrize("core", [bidirectional_attention, document_attention])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_equals_the_formula_within_each_document(core, kv_heads: int) -> None:
    """float64 softmax over the keys of the own document, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, heads, 90, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    borders = torch.zeros(2, 90, dtype=torch.bool)
    borders[0, [40, 41]] = True
    borders[1, [7]] = True
    starts = document_starts(torch.zeros(2, 90, dtype=torch.int64), borders, None)
    scores = q @ k.repeat_interleave(4 // kv_heads, 1).transpose(-1, -2) / 8**0.5
    hidden = starts[:, None, :, None] != starts[:, None, None, :]
    expected = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.repeat_interleave(4 // kv_heads, 1)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(expected, (q, k, v), weights)
    found = core(q, k, v, 0.0, starts)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (q, k, v), weights), gradients)
    assert not torch.allclose(plain_attention(q, k, v, 0.0, starts), expected)


def test_tokens_see_no_other_document(theirs: MegatronBertForPreTraining) -> None:
    """Other padding, and another document beside it, leave every logit of a document bit-equal."""
    ours, given = ours_with(theirs).eval(), batch()
    changed = given["tokens"].clone()
    changed[1, LENGTHS[1] :] = 7
    with torch.no_grad():
        first, second = (
            ours(torch.stack((tokens, given["types"])), None, given["starts"]) for tokens in (given["tokens"], changed)
        )
    assert torch.equal(first[: LENGTHS[1], 1], second[: LENGTHS[1], 1])
    assert not torch.equal(first[LENGTHS[1] :, 1], second[LENGTHS[1] :, 1])
