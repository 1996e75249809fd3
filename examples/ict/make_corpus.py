#!/usr/bin/env python
"""Makes a corpus of passages with questions from the docstrings of the running Python's standard library.

    python examples/ict/make_corpus.py FOLDER

A passage is a docstring without its first sentence, its title the name of what it describes; the first sentence is a
question that the passage answers. One question in seven is for the test, and no model sees it before. Writes

- documents.jsonl: titles and texts for the inverse cloze task; those of test questions lack their first sentence
- passages.tsv: the corpus in DPR's form
- train.json, valid.json: questions with their passage and a hard negative, the best other passage by BM25
- test.jsonl: questions with their answer, which is the text of the passage
- bm25.json: how often BM25 (Robertson and Zaragoza 2009) finds the passage of a test question
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


@dataclass(frozen=True)
class Entry:
    """What one docstring says."""

    title: str
    """The name of what it describes, in words."""
    question: str
    """Its first sentence."""
    text: str
    """The other ones."""


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
    drawn = random.Random(0).sample(range(len(found)), TEST + VALID)
    test, valid = sorted(drawn[:TEST]), sorted(drawn[TEST:])
    bm25 = BM25([f"{each.title} {each.text}" for each in found])

    def passage(number: int) -> dict[str, str]:
        return {"title": found[number].title, "text": found[number].text}

    def row(number: int) -> dict[str, object]:
        wrong = [each for each in bm25.best(found[number].question, 2) if each != number][:1]
        positive, hard = [passage(number)], [passage(each) for each in wrong]
        return {"question": found[number].question, "positive_ctxs": positive, "hard_negative_ctxs": hard}

    with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
        for number, each in enumerate(found):
            text = each.text if number in set(test) else f"{each.question} {each.text}"
            file.write(json.dumps({"title": each.title, "text": text}) + "\n")
    with (folder / "passages.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(("id", "text", "title"))
        writer.writerows((number, each.text, each.title) for number, each in enumerate(found))
    others = [number for number in range(len(found)) if number not in set(drawn)]
    for name, numbers in (("train", others), ("valid", valid)):
        (folder / f"{name}.json").write_text(json.dumps([row(number) for number in numbers]), encoding="utf-8")
    with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
        for number in test:
            file.write(json.dumps({"question": found[number].question, "answer": [found[number].text]}) + "\n")
    rankings = [bm25.best(found[number].question, max(TOPS)) for number in test]
    record = {
        f"top{top}_recall": sum(number in own[:top] for number, own in zip(test, rankings, strict=True)) / TEST
        for top in TOPS
    }
    (folder / "bm25.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    shares = "  ".join(f"{name} {value:.4f}" for name, value in record.items())
    print(f"{len(found):,} passages, {len(others):,} questions to learn from; BM25 on {TEST} test questions: {shares}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
