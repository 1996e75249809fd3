"""Corpora of passages and files of questions with answers, as DPR has them."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import regex

from megatron.data.retrieval.answers import REGEX, STRING, OpenQuestion, matcher, read_open_questions, words
from megatron.data.retrieval.evidence import Evidence
from megatron.data.retrieval.questions import Passage
from megatron.errors import RunError

DPR_WORDS = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
"""What DPR takes for words."""


@pytest.mark.parametrize(
    ("header", "end"), [("id\ttext\ttitle\n", "\n"), ("", "\n"), ("\ufeffid\ttext\ttitle\r\n", "")]
)
def test_passages_are_read_by_number(tmp_path: Path, header: str, end: str) -> None:
    path = tmp_path / "passages.tsv"
    lines = ['1\t"Aaron ""the"" prophet"\tAaron', "x7\tplain text", '3\tnaïve 中\t"a\tb"']
    path.write_bytes((header + "\n".join(lines) + end).encode())
    assert read(path) == [
        ("1", Passage("Aaron", 'Aaron "the" prophet')),
        ("x7", Passage("", "plain text")),
        ("3", Passage("a\tb", "naïve 中")),
    ]


BROKEN = [
    (b"", "no passage"),
    (b"id\ttext\ttitle\n", "no passage"),
    (b"1\ta\n2\n", "line 2 has 1 cells"),
    (b"1\ta\n2\t\xff\n", "line 2 is no tsv"),
    (b'1\ta\n2\t"a\n', "line 2 is no tsv"),
]


def read(path: Path) -> list[tuple[str, Passage]]:
    evidence = Evidence(path)
    return [evidence.passage(number) for number in range(len(evidence))]


@pytest.mark.parametrize(("content", "reported"), BROKEN)
def test_a_corpus_that_is_none_is_named(tmp_path: Path, content: bytes, reported: str) -> None:
    (tmp_path / "x.tsv").write_bytes(content)
    with pytest.raises(RunError, match=reported) as error:
        read(tmp_path / "x.tsv")
    assert "x.tsv" in str(error.value)


def test_questions_of_both_forms(tmp_path: Path) -> None:
    rows = [("who wrote it?", ["Ann Lee", 'the "A"']), ("where", ["Bonn"])]
    (tmp_path / "a.tsv").write_text("".join(f"{text}\t{answers!r}\n" for text, answers in rows))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in rows))
    expected = [OpenQuestion("who wrote it", ("Ann Lee", 'the "A"')), OpenQuestion("where", ("Bonn",))]
    assert read_open_questions(tmp_path / "b.jsonl") == expected
    assert read_open_questions(tmp_path / "a.tsv") == expected
    for content, reported in (
        ("q\tAnn\n", "line 1 is no question"),
        ("q\t'Ann'\n", "no list of answers"),
        ("", "no quest"),
    ):
        (tmp_path / "c.tsv").write_text(content)
        with pytest.raises(RunError, match=reported):
            read_open_questions(tmp_path / "c.tsv")


TEXTS = [
    "It's 3.5 km_h — naïve café, 中文字!",
    "Ünïcode ½ x² ٣\u200b\u00a0end",
    "a\tb\n\u0301c \ud7a3 \U0001f600x \u0915\u093f",
]


@pytest.mark.parametrize("text", TEXTS)
def test_words_are_those_of_dpr(text: str) -> None:
    assert words(text) == [each.lower() for each in DPR_WORDS.findall(unicodedata.normalize("NFD", text))]


@pytest.mark.parametrize(
    ("answer", "text", "match", "expected"),
    [
        ("New York", "in new  york, there", STRING, True),
        ("York New", "in new york", STRING, False),
        ("art", "a party", STRING, False),
        ("café", "the CAFE\u0301.", STRING, True),
        ("", "any", STRING, False),
        ("art", "a party", REGEX, True),
        (r"19\d\d", "in 1969", REGEX, True),
        ("(", "a (b", REGEX, False),
    ],
)
def test_an_answer_is_found_as_dpr_finds_it(answer: str, text: str, match: str, expected: bool) -> None:
    assert matcher([answer], match)(text) is expected
    assert matcher(["zz", answer], match)(text) is expected
