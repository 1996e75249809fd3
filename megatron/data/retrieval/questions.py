"""Questions with their passages, in the form of the files of DPR (arXiv:2004.04906).

A file is a JSON array, or JSON lines, of objects with question, positive_ctxs, negative_ctxs and hard_negative_ctxs;
each of these is a list of objects with title and text. The first positive passage is the right one. Questions without
one are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.errors import RunError

KINDS = ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")


@dataclass(frozen=True)
class Passage:
    """A title, "" for none, and a text."""

    title: str
    """Title of the document."""
    text: str
    """The passage."""


@dataclass(frozen=True)
class Question:
    """A question with its passages."""

    text: str
    """The question, without a question mark at its end."""
    positive: Passage
    """The right passage."""
    hard: tuple[Passage, ...]
    """Hard negatives."""
    other: tuple[Passage, ...]
    """Other negatives."""


def read_questions(path: Path) -> tuple[list[Question], int]:
    """Returns the questions of a file, and the number of those that have no right passage.

    Raises RunError that names the file and the question.
    """
    found, bare = [], 0
    for number, row in enumerate(_rows(path)):
        try:
            passages = {kind: _passages(row, kind) for kind in KINDS}
            question = row["question"]
            if not isinstance(question, str):
                raise TypeError("its question is no text")
        except (KeyError, TypeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            hint = "a question has question, positive_ctxs, negative_ctxs and hard_negative_ctxs, as files of DPR have"
            raise RunError.of(f"question {number}: {what}", location=str(path), hint=hint) from None
        positive, hard, other = (passages[kind] for kind in KINDS)
        if positive:
            found.append(Question(plain_question(question), positive[0], hard, other))
        else:
            bare += 1
    if not found:
        raise RunError.of("it has no question with a right passage", location=str(path))
    return found, bare


def plain_question(text: str) -> str:
    """Returns the question as DPR encodes it: with plain apostrophes, and without a question mark at its end."""
    text = text.replace("\u2019", "'")
    return text[:-1] if text.endswith("?") else text


def _rows(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            yield from json.loads(text)
            return
        for line in text.splitlines():
            if line.strip():
                yield json.loads(line)
    except ValueError as error:
        hint = "give a JSON array, or an object a line"
        raise RunError.of(f"it is not JSON in UTF-8: {error}", location=str(path), hint=hint) from None


def _passages(row: Any, kind: str) -> tuple[Passage, ...]:
    if not isinstance(row, dict):
        raise TypeError("it is no object")
    listed = row["positive_ctxs"] if kind == "positive_ctxs" else row.get(kind) or []
    if not isinstance(listed, list):
        raise TypeError(f"its {kind} is no list")
    return tuple(_passage(each, kind) for each in listed)


def _passage(each: Any, kind: str) -> Passage:
    if not isinstance(each, dict) or not isinstance(each.get("text"), str):
        raise TypeError(f"its {kind} has a passage without text")
    return Passage(str(each.get("title") or ""), each["text"])
