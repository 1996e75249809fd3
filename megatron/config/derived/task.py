"""What the keys of a task decide: the form of its files, its classes, its answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from megatron.errors import ConfigError

CLASSES = "classification"
"""The objective that fine-tunes a classifier."""
TASK_KEYS = ("task_format", "task_labels", "task_choices")
_LABELS = {"mnli": ("contradiction", "entailment", "neutral"), "qqp": ("0", "1")}
_ANSWERS = {"race": 4}


def derive_task(given: Mapping[str, Any], num_classes: int | None, files: tuple[str, ...]) -> dict[str, Any]:
    """Returns the values of TASK_KEYS and num_classes. Raises ConfigError where the classes are not known.

    Args:
        given: the values of TASK_KEYS, None where they are left out.
        num_classes: that of the configuration.
        files: of the task.
    """
    form = given["task_format"] or _form(files)
    labels = given["task_labels"] or _LABELS.get(form or "")
    choices = given["task_choices"] or _ANSWERS.get(form or "")
    known = 1 if choices else len(labels or ())
    if files and not known:
        raise ConfigError.of(
            "a task needs its classes",
            key="task_labels",
            hint="list the labels as the files spell them, or give task_choices for questions with answers",
        )
    if num_classes is not None and known and num_classes != known:
        why = "a multiple-choice task has a logit for each answer" if choices else f"task_labels has {known}"
        raise ConfigError.of(f"{why}, so it is {known}", key="num_classes", value=num_classes, hint="leave it out")
    if labels and choices and given["task_labels"]:
        what = "answers of a question have no labels: task_choices counts them"
        raise ConfigError.of(what, key="task_labels", value=list(labels), hint="leave one of the two out")
    return {
        "task_format": form,
        "task_labels": None if choices else labels,
        "task_choices": choices,
        "num_classes": known or num_classes,
    }


def _form(files: tuple[str, ...]) -> str | None:
    endings = {PurePath(name).suffix for name in files[:1]}
    return {".jsonl": "jsonl", ".json": "jsonl", ".tsv": "tsv"}.get(next(iter(endings), ""))
