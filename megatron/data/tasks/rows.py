"""Rows of task files: a text or a pair, or the answers of a question, and the class.

Source: the public forms of RACE (arXiv:1704.04683), MNLI and QQP (arXiv:1804.07461), as Megatron-LM's tasks read them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError, RunError

UNLABELED = -1
_OF_PUBLIC_TASKS = ("race", "mnli", "qqp")
LONGEST_CELL = 1 << 27
"""Most characters of a cell of a tsv."""
_ANSWERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Row:
    """One sample of a task."""

    name: str
    """Of the row in its file, for predictions."""
    texts: tuple[tuple[str, str | None], ...]
    """The text and its pair of each sequence: one, or one for each answer."""
    label: int
    """Index of the class or of the right answer; UNLABELED without one."""


@dataclass(frozen=True)
class RowForm:
    """How the rows of a task's files are read."""

    form: str
    """Name of the form, a value of task_format."""
    labels: tuple[str, ...]
    """Labels of the classes in the order of the logits; empty for multiple choice."""
    choices: int
    """Answers of a question; 0 for classes."""
    fields: Mapping[str, Any]
    """Field or column of each meaning."""

    def read(self, path: Path) -> list[Row]:
        """Returns the rows of a file. Raises RunError that names the file and the line."""
        rows = []
        csv.field_size_limit(LONGEST_CELL)
        try:
            for line, number, found in self._found(path):
                rows += self._rows(path, line, number, found)
        except UnicodeDecodeError as error:
            raise RunError.of(f"it is not UTF-8 text: {error}", location=str(path)) from None
        except csv.Error as error:
            raise RunError.of(f"it is not a tsv: {error}", location=str(path)) from None
        if not rows:
            raise RunError.of("it has no rows", location=str(path))
        return rows

    def _rows(self, path: Path, line: int, number: int, found: Any) -> list[Row]:
        """Returns the rows of what is in one line.

        Args:
            path: The file.
            line: Of the file, from 1.
            number: Of the row.
            found: What is there.
        """
        try:
            return [self._row(*each) for each in _READERS[self.form](self, found, number)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RunError.of(
                f"line {line} is not a row of the form {self.form}: {_said(error)}",
                location=str(path),
                hint="see task_format, task_fields and task_labels",
            ) from None

    def _found(self, path: Path) -> Iterator[tuple[int, int, Any]]:
        """Yields line, number of the row and what is there, of each row."""
        with path.open(encoding="utf-8-sig", newline="" if self.form not in ("jsonl", "race") else None) as lines:
            if self.form in ("jsonl", "race"):
                for line, text in enumerate(lines, 1):
                    if text.strip():
                        yield line, line - 1, _json(text, line, path)
                return
            cells = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            header: list[str] | None = None
            numbered = all(isinstance(value, int) for value in self.fields.values())
            named = self.form != "tsv" or not self.fields or not numbered
            number = 0
            for row in cells:
                if named and header is None:
                    header = row
                    continue
                if any(cell.strip() for cell in row):
                    yield cells.line_num, number, (header, row)
                    number += 1

    def _row(self, name: str, texts: Sequence[tuple[str, str | None]], label: Any) -> Row:
        if self.choices and len(texts) != self.choices:
            raise ValueError(f"it has {len(texts)} choices and task_choices is {self.choices}")
        if self.form in _OF_PUBLIC_TASKS:
            texts = [(clean(text), None if pair is None else clean(pair)) for text, pair in texts]
        return Row(name, tuple(texts), self._number(label))

    def _number(self, label: Any) -> int:
        if label is None or label == "":
            return UNLABELED
        names = self.labels or tuple(_ANSWERS[: self.choices])
        spelt = ("false", "true")[label] if isinstance(label, bool) else str(label).strip()
        if self.choices and spelt.lstrip("-").isdigit():
            if not 0 <= int(spelt) < self.choices:
                raise ValueError(f"its label {spelt} is none of the {self.choices} choices, counted from 0")
            return int(spelt)
        if spelt not in names:
            raise ValueError(f"its label {spelt!r} is none of {', '.join(names)}")
        return names.index(spelt)

    def texts_of(self, take: Callable[[str], Any]) -> list[tuple[str, str | None]]:
        """Returns the texts of a row with named fields. take: meaning -> value, None where the row lacks it."""
        text, pair, answers = take("text"), take("text_pair"), take("choices") if self.choices else None
        if text is None:
            raise KeyError(self.fields.get("text", "text"))
        if not self.choices:
            return [(_text(text), None if pair is None else _text(pair))]
        if not isinstance(answers, list):
            raise ValueError(f"{self.fields.get('choices', 'choices')} is not a list of answers")
        return [(f"{_text(text)} {_text(answer)}", None if pair is None else _text(pair)) for answer in answers]


def clean(text: str) -> str:
    """Returns the text on one line with single blanks, and sentence ends without a blank before them."""
    return re.sub(r"\s+", " ", text).strip().replace(" . ", ". ")


def _jsonl(form: RowForm, found: Any, number: int) -> Iterator[tuple[str, list[tuple[str, str | None]], Any]]:
    if not isinstance(found, dict):
        raise TypeError("it is no object")

    def take(meaning: str) -> Any:
        return found.get(form.fields.get(meaning, meaning))

    name = take("id")
    yield str(number if name is None else name), form.texts_of(take), take("label")


def _tsv(form: RowForm, found: Any, number: int) -> Iterator[tuple[str, list[tuple[str, str | None]], Any]]:
    header, cells = found

    def take(meaning: str) -> Any:
        field = form.fields.get(meaning, meaning)
        if meaning == "choices":
            return [take_column(one) for one in field] if isinstance(field, list | tuple) else None
        if isinstance(field, str) and field not in (header or ()):
            if meaning in form.fields and meaning != "label":
                raise KeyError(field)
            return None
        return take_column(field)

    def take_column(field: Any) -> str:
        index = field if isinstance(field, int) else header.index(field)
        return str(cells[index])

    name = take("id")
    yield str(number if name is None else name), form.texts_of(take), take("label")


def _mnli(form: RowForm, found: Any, number: int) -> Iterator[tuple[str, list[tuple[str, str | None]], Any]]:
    """Columns 0 id, 8 and 9 the texts, the last one the label, which a file of ten columns lacks."""
    header, cells = found
    labeled = len(header) > 10
    yield cells[0].strip(), [(cells[8], cells[9])], cells[-1] if labeled else None


def _qqp(form: RowForm, found: Any, number: int) -> Iterator[tuple[str, list[tuple[str, str | None]], Any]]:
    """Columns 0 id, 3 and 4 the questions, 5 the label; a file of three columns has id and questions alone."""
    header, cells = found
    if len(header) == 3:
        yield cells[0].strip(), [(cells[1], cells[2])], None
    else:
        yield cells[0].strip(), [(cells[3], cells[4])], cells[5]


def _race(form: RowForm, found: Any, number: int) -> Iterator[tuple[str, list[tuple[str, str | None]], Any]]:
    """One article with its questions; an answer stands in the gap of its question, or behind it."""
    answers = found.get("answers") or [None] * len(found["questions"])
    for index, (question, options, answer) in enumerate(
        zip(found["questions"], found["options"], answers, strict=True)
    ):
        texts = [question.replace("_", option) if "_" in question else f"{question} {option}" for option in options]
        yield f"{found.get('id', number)}:{index}", [(text, found["article"]) for text in texts], answer


_READERS = {"jsonl": _jsonl, "tsv": _tsv, "mnli": _mnli, "qqp": _qqp, "race": _race}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _json(text: str, line: int, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RunError.of(f"line {line} is not JSON: {error}", location=str(path)) from None


def _said(error: Exception) -> str:
    return f"it has no field {error}" if isinstance(error, KeyError) else str(error)


def task_files(names: Sequence[str], form: str, key: str) -> list[Path]:
    """Returns the files of a list of files and folders, those of a folder sorted.

    Raises ConfigError for what is not there, and for folders without a file of the form.

    Args:
        names: Files and folders.
        form: Value of task_format.
        key: What named them.
    """
    json_lines = (".jsonl", ".json")
    endings = {"race": (".txt", *json_lines), "jsonl": json_lines, "dpr": json_lines}.get(form, (".tsv", ".txt"))
    files: list[Path] = []
    for name in names:
        path = Path(name)
        found = [path]
        if path.is_dir():
            found = sorted(each for each in path.rglob("*") if each.is_file() and each.suffix in endings)
        if not found or not path.exists():
            what = f"it has no file that ends in {' or '.join(endings)}" if path.exists() else "there is no such file"
            raise ConfigError.of(what, key=key, value=name)
        files += found
    return files
