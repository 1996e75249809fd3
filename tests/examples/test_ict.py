"""examples/ict: what the maker takes of docstrings, and the whole example, whose recall is stated in its page."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, DPRQuestionEncoder

from tests.examples.scripts import EXAMPLES, run

FLOORS = {("pretrained", "passages"): 0.8, ("tuned", "passages"): 0.9}
FLOORS |= {("pretrained", "rest"): 0.35, ("tuned", "rest"): 0.35}
"""Of the share of test questions whose passage is among the first 5, by model and corpus; chance is 0.002."""
SOURCE = '''"""Read and write the files of a catalogue. They are sorted by their names, and each has one line."""


class FileCatalogue:
    def find_all(self):
        """Return the names of all files as a list. The list is sorted, and has no name twice, e.g. of a link."""

    def again(self):
        """Return the names of all files as a list. What a passage began with before begins no other one of them."""

    def close(self):
        """Close the catalogue and all of its files."""
'''


def maker() -> SimpleNamespace:
    """The example's maker of the corpus."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "ict" / "make_corpus.py")))


def test_the_first_sentence_is_the_question_and_not_in_the_rest(tmp_path: Path) -> None:
    module = maker()
    (tmp_path / "catalogue.py").write_text(SOURCE)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "of_it.py").write_text(SOURCE.replace("files", "tests"))
    (tmp_path / "damaged.py").write_text("def (:")
    found = [(each.title, each.question, each.text) for each in module.entries(tmp_path)]
    assert found == [
        (
            "catalogue",
            "Read and write the files of a catalogue.",
            "They are sorted by their names, and each has one line.",
        ),
        (
            "catalogue File Catalogue find all",
            "Return the names of all files as a list.",
            "The list is sorted, and has no name twice, e.g. of a link.",
        ),
    ]


def test_bm25_is_its_formula() -> None:
    texts = ["a b b c", "a d", "e f g h i j"]
    found = maker().BM25(texts)
    assert found.best("b d x", 3) == [0, 1]

    def weight(word: str, count: int, length: int) -> float:
        holding = sum(word in text.split() for text in texts)
        rarity = math.log(1 + (3 - holding + 0.5) / (holding + 0.5))
        return rarity * count * (1.2 + 1) / (count + 1.2 * (1 - 0.75 + 0.75 * length / 4))

    assert dict(found._weights["b"]) == {0: pytest.approx(weight("b", 2, 4))}
    assert dict(found._weights["a"]) == {0: pytest.approx(weight("a", 1, 4)), 1: pytest.approx(weight("a", 1, 2))}


def test_what_other_passages_say_is_no_question() -> None:
    module = maker()
    found = [
        module.Entry("a", "It is one.", "Two follow."),
        module.Entry("b", "It is two.", "As a says: It is one. Three."),
    ]
    assert module.said_once(found) == [1]


@pytest.mark.long
def test_it_finds_passages_of_questions_that_it_never_saw(tmp_path: Path) -> None:
    """And transformers computes the same embeddings from the folders at the end."""
    run([str(EXAMPLES / "ict" / "run.sh"), "work"], tmp_path, seconds=3000)
    work = tmp_path / "work"
    asked = [json.loads(line)["question"] for line in (work / "test.jsonl").read_text().splitlines()]
    asked += [row["question"] for row in json.loads((work / "valid.json").read_text())]
    learned = "\n".join(json.loads(line)["text"] for line in (work / "documents.jsonl").read_text().splitlines())
    for row in json.loads((work / "train.json").read_text()):
        texts = [each["text"] for each in row["positive_ctxs"] + row["hard_negative_ctxs"]]
        learned += "\n".join(["", row["question"], *texts])
    assert len(asked) == 600 and not [question for question in asked if question in learned]
    bm25 = json.loads((work / "bm25.json").read_text())
    assert bm25["passages"]["top5_recall"] > 0.99 and bm25["rest"]["top5_recall"] > 0.5
    for (model, corpus), floor in FLOORS.items():
        record = json.loads((work / f"logs/{model}-{corpus}/search_passages/retrieval.json").read_text())
        assert record["test.jsonl"]["questions"] == 400
        assert record["test.jsonl"]["top5_recall"] > floor, (model, corpus)
    searched = work / "logs/tuned-passages/search_passages/passages.jsonl"
    rows = [json.loads(line) for line in searched.read_text().splitlines()]
    stored, found = np.load(work / "embeddings/tuned-passages/vectors.npy"), [row["passages"][0] for row in rows]
    folder = work / "trained" / "question_encoder"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), DPRQuestionEncoder.from_pretrained(folder)
    texts = [row["question"] for row in rows]
    given = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        vectors = model(given["input_ids"], given["attention_mask"]).pooler_output.numpy()
    scores = vectors @ stored.T
    np.testing.assert_allclose([each["score"] for each in found], scores.max(axis=1), rtol=1e-4)
    assert scores[range(len(found)), [int(each["id"]) for each in found]].tolist() == pytest.approx(
        scores.max(axis=1).tolist(), rel=1e-4
    )
