"""What the keys of a task decide, and what a classifier cannot have: each rule in its own words."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.small import errors, resolved

TASK: dict[str, Any] = {"train_impl": "classification", "task_train_data": ["a.jsonl"], "task_labels": ["x", "y", "z"]}
CASES: list[tuple[dict[str, Any], str]] = [
    ({"task_train_data": None}, "trains on a task"),
    ({"task_labels": None}, "a task needs its classes"),
    ({"task_labels": ["x"]}, "one class has nothing to tell apart"),
    ({"task_labels": ["x", "y", "x"]}, "a label stands twice in it"),
    ({"num_classes": 2}, "task_labels has 3, so it is 3"),
    ({"task_choices": 4}, "answers of a question have no labels"),
    ({"task_labels": None, "task_choices": 1}, "a question has at least 2 answers"),
    ({"task_labels": None, "task_choices": 3, "num_classes": 3}, "has a logit for each answer, so it is 1"),
    ({"task_train_data": ["a.csv"]}, "it does not follow from the files' names"),
    ({"task_fields": {"texts": "t"}}, "no field is a texts"),
    ({"task_train_data": ["a.tsv"], "task_fields": {"text": 1, "label": -1}}, "columns are numbered from 0"),
    ({"task_fields": {"text": 1}}, "its values cannot be read"),
    ({"task_train_data": ["a.tsv"], "task_fields": {"text": 1, "label": "l"}}, "its values cannot be read"),
    ({"task_format": "mnli", "task_labels": None, "task_fields": {"text": "t"}}, "have fields of their own"),
    (
        {"task_train_data": ["a.tsv"], "task_labels": None, "task_choices": 2, "task_fields": {"text": "t"}},
        "a tsv has a column for each answer",
    ),
    ({"seq_length": 6, "max_position_embeddings": 6}, "a sample has at least 8 tokens"),
    ({"data_path": "d"}, "a task is not read from token files"),
    ({"lm_head": "masked"}, "train_impl: classification has the head classification"),
    ({"attention_mask": "causal"}, "train_impl: classification asks for tokens from both sides"),
    ({"checkpoint_validation_with_forward_pass": True}, "it compares the logits of a language model"),
    ({"char_level_ppl": True}, "its loss is of no characters"),
    ({"rampup_batch_size": [1, 1, 8]}, "epochs of a task are counted in steps of one size"),
    ({"train_impl": "normal", "num_classes": 2}, "only train_impl: classification has classes"),
    (
        {"train_impl": "bert", "pretrained_checkpoint": "x"},
        "train_impl: classification, ict, dpr get another head",
    ),
    ({"eval_tasks": ["piqa"]}, "does not continue a text"),
    ({"lora": {"rank": 2}}, "adapters are trained beside a causal model"),
    ({"pos_emb": "alibi"}, "its biases of scores are those of earlier tokens"),
]


@pytest.mark.parametrize(("changes", "reported"), CASES, ids=[case[1][:50] for case in CASES])
def test_rule(changes: dict[str, Any], reported: str) -> None:
    lines = errors(**{**TASK, **changes})
    assert any(reported in line for line in lines), "\n".join(lines)


def test_forms_decide_classes_and_answers() -> None:
    config = resolved(**TASK).config
    model, task = config.model, config.task
    assert (model.num_classes, task.task_format, model.attention_mask) == (3, "jsonl", "bidirectional")
    assert (model.lm_head, model.num_token_types, model.bert_binary_head) == ("classification", 2, False)
    named = {"task_labels": None, "task_train_data": ["folder"]}
    for form, classes, labels, choices in (
        ("mnli", 3, ("contradiction", "entailment", "neutral"), None),
        ("qqp", 2, ("0", "1"), None),
        ("race", 1, None, 4),
    ):
        config = resolved(**{**TASK, **named, "task_format": form}).config
        assert (config.model.num_classes, config.task.task_labels, config.task.task_choices) == (
            classes,
            labels,
            choices,
        )
