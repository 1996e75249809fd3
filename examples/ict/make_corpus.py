#!/usr/bin/env python
"""Makes a corpus of passages with questions from the docstrings of the running Python's standard library.

    python examples/ict/make_corpus.py FOLDER

A passage is a docstring, its title the name of what it describes. Its first sentence is a question, whose answer is the
passage. 400 questions are for the test and 100 for validation: nothing that a model learns from has those sentences.
Writes

- documents.jsonl: titles and texts for the inverse cloze task
- passages.tsv: the corpus in DPR's form, docstrings as they are
- rest.tsv: the same without the first sentences
- train.json, valid.json: questions with their passage, once as it is and once without the question's sentence, and a
  hard negative, the best other passage by BM25 whose question is to learn from
- test.jsonl: questions with their answer, which is the text of the passage behind its first sentence
- bm25.json: how often BM25 (Robertson and Zaragoza 2009) finds the passage of a test question in either corpus
"""

from __future__ import annotations

import ast
import csv
import json
import math
import random
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from megatron.data.preprocess.sentences import Sentences

LEFT_OUT = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data"})
SHORTEST, LONGEST = 8, 100
"""Words of a passage; what is longer loses its end."""
TEST, VALID = 400, 100
"""Number of questions."""
TOPS = (1, 5, 20)
CORPORA = ("passages", "rest")


@dataclass(frozen=True)
class Entry:
    """What one docstring says."""

    title: str
    """The name of what it describes, in words."""
    question: str
    """Its first sentence."""
    text: str
    """The other ones."""

    def passage(self, corpus: str) -> dict[str, str]:
        """Title and text in one of the corpora."""
        return {"title": self.title, "text": f"{self.question} {self.text}" if corpus == "passages" else self.text}


def docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Names and docstrings of modules, classes and functions below a folder, in order."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # files for other versions
        names: list[tuple[str, ast.AST]] = [(".".join(parts).removesuffix(".__init__"), tree)]
        while names:
            name, node = names.pop()
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                found = ast.get_docstring(node)
                if found:
                    yield name, found
                names += [(f"{name}.{each.name}", each) for each in reversed(node.body) if hasattr(each, "name")]


def in_words(name: str) -> str:
    """A dotted name with blanks between its words."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[._]+", " ", name).strip()


def entries(root: Path) -> list[Entry]:
    """Docstrings of two sentences or more, each sentence and passage once."""
    found, known = [], set()
    for name, docstring in docstrings(root):
        first, *others = (" ".join(each.split()) for each in Sentences().split(docstring))
        text = " ".join(" ".join(others).split()[:LONGEST])
        if len(first.split()) < 4 or len(text.split()) < SHORTEST or known & {first, text}:
            continue
        known |= {first, text}
        found.append(Entry(in_words(name), first, text))
    return found


def said_once(found: Sequence[Entry]) -> list[int]:
    """Numbers of the entries whose question is in no other passage."""
    everything = "\n".join(each.passage("passages")["text"] for each in found)
    return [number for number, each in enumerate(found) if everything.count(each.question) == 1]


class BM25:
    """Scores of passages by the words that they share with a question, with the usual k1 = 1.2 and b = 0.75."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Counts the words of each text."""
        counts = [Counter(words(text)) for text in texts]
        mean = sum(map(Counter.total, counts)) / len(texts)
        holding: dict[str, list[int]] = defaultdict(list)
        for number, count in enumerate(counts):
            for word in count:
                holding[word].append(number)
        self._weights: dict[str, list[tuple[int, float]]] = {}
        for word, numbers in holding.items():
            rarity = math.log(1 + (len(texts) - len(numbers) + 0.5) / (len(numbers) + 0.5))
            self._weights[word] = [
                (each, rarity * 2.2 * (n := counts[each][word]) / (n + 0.3 + 0.9 * counts[each].total() / mean))
                for each in numbers
            ]

    def best(self, question: str, count: int) -> list[int]:
        """Numbers of the texts with the highest scores, the best first; those that share no word are left out."""
        scores: Counter[int] = Counter()
        for word in words(question):
            for number, weight in self._weights.get(word, ()):
                scores[number] += weight
        return [number for number, _ in scores.most_common(count)]


def words(text: str) -> list[str]:
    """Words and numbers in lower case."""
    return re.findall(r"[a-z0-9]+", text.lower())


def main(folder: Path) -> int:
    """Writes the files."""
    folder.mkdir(parents=True, exist_ok=True)
    found = entries(Path(sysconfig.get_paths()["stdlib"]))
    drawn = random.Random(0).sample(said_once(found), TEST + VALID)
    test, valid, held_out = sorted(drawn[:TEST]), sorted(drawn[TEST:]), set(drawn)
    bm25 = {corpus: BM25([" ".join(each.passage(corpus).values()) for each in found]) for corpus in CORPORA}

    def row(number: int, corpus: str) -> dict[str, object]:
        own = found[number]
        best = bm25[corpus].best(own.question, 20)
        wrong = [each for each in best if each != number and each not in held_out][:1]
        hard = [found[each].passage(corpus) for each in wrong]
        return {"question": own.question, "positive_ctxs": [own.passage(corpus)], "hard_negative_ctxs": hard}

    with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
        for number, each in enumerate(found):
            file.write(json.dumps(each.passage("rest" if number in held_out else "passages")) + "\n")
    for corpus in CORPORA:
        with (folder / f"{corpus}.tsv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ("id", "text", "title"), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows({"id": number, **each.passage(corpus)} for number, each in enumerate(found))
    others = [number for number in range(len(found)) if number not in held_out]
    for name, numbers in (("train", others), ("valid", valid)):
        rows = [row(number, corpus) for corpus in CORPORA for number in numbers]
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
        for number in test:
            file.write(json.dumps({"question": found[number].question, "answer": [found[number].text]}) + "\n")
    print(f"{len(found):,} passages, {len(others):,} questions to learn from, {TEST} for the test")
    record = {corpus: recall(bm25[corpus], found, test) for corpus in CORPORA}
    (folder / "bm25.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return 0


def recall(bm25: BM25, found: Sequence[Entry], test: Sequence[int]) -> dict[str, float]:
    """The share of test questions whose passage is among the first of BM25, for each of TOPS; prints it, too."""
    rankings = [bm25.best(found[number].question, max(TOPS)) for number in test]
    pairs = list(zip(test, rankings, strict=True))
    shares = {f"top{top}_recall": sum(number in own[:top] for number, own in pairs) / len(test) for top in TOPS}
    print("BM25:", *(f"{name} {value:.4f}" for name, value in shares.items()), sep="  ")
    return shares


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
