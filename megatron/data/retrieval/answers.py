"""Open questions with their answers, and whether a text has an answer, as DPR decides it (arXiv:2004.04906).

A file is a tsv of questions and Python lists of answers, or JSON lines with question and answer.
"""

from __future__ import annotations

import ast
import csv
import functools
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.data.retrieval.questions import plain_question
from megatron.errors import RunError

STRING, REGEX = "string", "regex"
MATCHES = (STRING, REGEX)
"""Ways to find an answer in a text: its words one after the other, or as a regular expression."""
_HINT = 'give lines with a question, a tab and a list such as ["Paris"], or JSON lines with question and answer'


@dataclass(frozen=True)
class OpenQuestion:
    """A question and its answers."""

    text: str
    """The question, without a question mark at its end."""
    answers: tuple[str, ...]
    """Texts, or regular expressions, of which one is enough."""


def read_open_questions(path: Path) -> list[OpenQuestion]:
    """Returns the questions of a file. Raises RunError that names the file and the line."""
    found = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found.append(_question(path, number, line.rstrip("\r\n")))
    except (OSError, UnicodeDecodeError) as error:
        raise RunError.of(f"it cannot be read: {error}", location=str(path), hint=_HINT) from None
    if not found:
        raise RunError.of("it has no question", location=str(path), hint=_HINT)
    return found


def _question(path: Path, number: int, line: str) -> OpenQuestion:
    try:
        if path.suffix in (".jsonl", ".json"):
            row = json.loads(line)
            text, answers = row["question"], row["answer"]
        else:
            text, listed = next(csv.reader([line], delimiter="\t"))
            answers = ast.literal_eval(listed)
    except (ValueError, SyntaxError, KeyError, TypeError, csv.Error) as error:
        raise RunError.of(f"line {number} is no question: {error}", location=str(path), hint=_HINT) from None
    if not isinstance(text, str) or not isinstance(answers, list) or not all(isinstance(one, str) for one in answers):
        raise RunError.of(f"line {number} has no list of answers", location=str(path), hint=_HINT)
    return OpenQuestion(plain_question(text), tuple(answers))


def matcher(answers: Sequence[str], match: str) -> Callable[[str], bool]:
    """Returns what says whether a text has one of the answers.

    Args:
        answers: texts, or regular expressions.
        match: STRING or REGEX. An expression that is none matches nothing, as with DPR.
    """
    if match == REGEX:
        expressions = [found for each in answers if (found := _expression(each)) is not None]
        return lambda text: any(each.search(unicodedata.normalize("NFD", text)) for each in expressions)
    split = [own for own in map(words, answers) if own]
    return lambda text: _has(words(text), split)


def words(text: str) -> list[str]:
    """Returns letters, digits and their marks that stand together, and other visible characters one by one.

    The text is in normal form NFD and lower case.
    """
    found = _pattern().findall(unicodedata.normalize("NFD", text))
    return [each.lower() for each in found if len(each) > 1 or unicodedata.category(each)[0] not in "CZ"]


def _has(text: list[str], answers: Sequence[list[str]]) -> bool:
    for answer in answers:
        first, size = answer[0], len(answer)
        if any(text[at : at + size] == answer for at, word in enumerate(text) if word == first):
            return True
    return False


def _expression(answer: str) -> re.Pattern[str] | None:
    try:
        return re.compile(unicodedata.normalize("NFD", answer), re.IGNORECASE | re.MULTILINE)
    except re.error:
        return None


@functools.cache
def _pattern() -> re.Pattern[str]:
    """Words with their marks, which are no word characters for Python, or one other character."""
    marks = "".join(chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M")
    return re.compile(rf"(?:[^\W_]|[{re.escape(marks)}])+|\S")
