"""Logits, losses and gradients of a classifier equal those of transformers' classes for Megatron's BERT.

A wrong mask of padding, token type, pooler, order of answers or normalization of a loss breaks these.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import MegatronBertConfig, MegatronBertForMultipleChoice, MegatronBertForSequenceClassification

from megatron.distributed.mesh import Topology
from megatron.objectives.classification import Classification, ClassScores
from tests.model.sections import build, disturb
from tests.model.test_masked_model import (
    BATCH,
    ENCODER,
    LAYERS,
    LENGTH,
    SETTINGS,
    batch,
    transformers_names,
    under_our_names,
)

CHOICES = {"classes": 1, "answers": 3}
LABELS = {"classes": [2, 0, 1], "answers": [1]}


def theirs_of(kind: str) -> Any:
    torch.manual_seed(4)
    config = MegatronBertConfig(**SETTINGS, num_labels=3)
    made = {"classes": MegatronBertForSequenceClassification, "answers": MegatronBertForMultipleChoice}[kind]
    model = made(config).train()
    disturb(model)
    return model


def class_names() -> dict[str, str]:
    """Our name -> transformers' name of the tensors that are the same."""
    names = {ours: name for ours, name in transformers_names().items() if not name.startswith("cls.")}
    return names | {f"{LAYERS + 4}.classifier.{kind}": f"classifier.{kind}" for kind in ("weight", "bias")}


@pytest.mark.parametrize("kind", CHOICES)
def test_logits_losses_and_gradients_equal_transformers(kind: str) -> None:
    theirs, given, choices, scores = theirs_of(kind), batch(), CHOICES[kind], ClassScores()
    head = {"lm_head": "classification", "num_classes": 3 if choices == 1 else 1, "bert_binary_head": False}
    ours = build(reset_attention=True, **{**ENCODER, **head})
    parameters = {name.removeprefix("sequential."): each for name, each in ours.named_parameters()}
    source = under_our_names(dict(theirs.named_parameters()), class_names())
    assert source.keys() == parameters.keys()
    with torch.no_grad():
        for name, value in source.items():
            parameters[name].copy_(value)
    shape = (BATCH, LENGTH) if choices == 1 else (1, BATCH, LENGTH)
    expected = theirs(
        input_ids=given["tokens"].view(shape), token_type_ids=given["types"].view(shape),
        attention_mask=given["real"].view(shape), labels=torch.tensor(LABELS[kind]),
    )  # fmt: skip
    expected.loss.backward()
    labels, counted = torch.zeros(BATCH, LENGTH, dtype=torch.long), torch.zeros(BATCH, LENGTH)
    labels[::choices, 0], counted[::choices, 0] = torch.tensor(LABELS[kind]), 1.0
    logits = ours(torch.stack((given["tokens"], given["types"])), None, given["starts"])
    torch.testing.assert_close(logits.view(expected.logits.shape), expected.logits, rtol=1e-5, atol=1e-5)

    objective, axis = Classification(choices, scores), Topology.single().model
    scores.start()
    loss = objective.loss(logits, labels, counted, axis, tokens=counted.sum())
    assert float(loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-6)
    loss.backward()
    gradients = under_our_names({name: each.grad for name, each in theirs.named_parameters()}, class_names())
    for name, gradient in gradients.items():
        found = parameters[name].grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6, msg=partial("{}: {}".format, name))

    assert scores.take() is None  # a training step is not recorded
    scores.start()
    with torch.no_grad():
        counted[0] = 0.0  # a sample without a label has no loss, and a prediction
        left = objective.loss(logits, labels, counted, axis, tokens=torch.ones(()))
    rows = torch.nn.functional.cross_entropy(
        expected.logits, torch.tensor(LABELS[kind]), reduction="none"
    ).detach()  # fmt: skip
    assert float(left) == pytest.approx(float(rows[1:].sum()), rel=1e-5, abs=1e-7)
    found_scores = scores.take()
    assert found_scores is not None and found_scores.shape == expected.logits.shape
