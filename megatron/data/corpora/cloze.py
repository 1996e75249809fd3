"""A small cloze task made of held-out text: which of four lines comes next?

Every item is a stretch of a document and four lines to go on with: the one that does, and three that stand elsewhere in
the held-out text. The wrong lines are indented alike and of nearly the same length, and no line occurs twice, so that
neither layout nor length gives the answer away. A model that knows nothing gets a quarter right.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SEED = 1234
ITEMS = 200
CHOICES = 4
CONTEXT_LINES = 12
LEAST_CONTEXT = 100  # [characters]
LINE_LENGTHS = range(24, 80)  # [characters], without indentation
LENGTH_TOLERANCE = 0.2  # of the true line's length
ITEMS_PER_DOCUMENT = 10


@dataclass(frozen=True)
class _ClozeLine:
    """A line that may be asked for. gap: the line ends before it, and its indentation."""

    document: int
    number: int
    gap: str
    text: str

    @property
    def indentation(self) -> str:
        return self.gap.rpartition("\n")[2]


def cloze_items(documents: Sequence[str], *, items: int = ITEMS, seed: int = SEED) -> list[dict[str, object]]:
    """At most `items` questions: context, choices (each to be put directly after the context) and label (0 to 3)."""
    lines = [document.splitlines() for document in documents]
    askable = _askable(lines)
    alike: dict[str, list[_ClozeLine]] = defaultdict(list)
    for line in askable:
        alike[line.indentation].append(line)
    chance = random.Random(seed)
    chance.shuffle(askable)
    made: list[dict[str, object]] = []
    taken: Counter[int] = Counter()
    for line in askable:
        if len(made) == items:
            break
        context = _context(lines[line.document], line.number)
        if taken[line.document] == ITEMS_PER_DOCUMENT or len(context) < LEAST_CONTEXT:
            continue
        tolerance = LENGTH_TOLERANCE * len(line.text)
        others = [
            other.text
            for other in alike[line.indentation]
            if other.document != line.document and abs(len(other.text) - len(line.text)) <= tolerance
        ]
        if len(others) < CHOICES - 1:
            continue
        choices = [line.text, *chance.sample(others, CHOICES - 1)]
        chance.shuffle(choices)
        made.append(
            {
                "context": context,
                "choices": [line.gap + choice for choice in choices],
                "label": choices.index(line.text),
            }
        )
        taken[line.document] += 1
    return made


def _askable(documents: Sequence[Sequence[str]]) -> list[_ClozeLine]:
    """Lines of a fit length that occur once in all the documents and follow other text."""
    occurrences = Counter(line.strip() for document in documents for line in document)
    found = []
    for document, lines in enumerate(documents):
        for number, line in enumerate(lines):
            text = line.strip()
            before = number
            while before and not lines[before - 1].strip():
                before -= 1
            if before and len(text) in LINE_LENGTHS and occurrences[text] == 1:
                indentation = line[: len(line) - len(line.lstrip())]
                found.append(_ClozeLine(document, number, "\n" * (number - before + 1) + indentation, text))
    return found


def _context(lines: Sequence[str], number: int) -> str:
    """The lines before a line, without empty lines at either end."""
    return "\n".join(lines[max(0, number - CONTEXT_LINES) : number]).lstrip("\n").rstrip()


def cloze_task(name: str, path: Path) -> str:
    """The YAML of an lm-evaluation-harness task over a file of items; nothing is fetched."""
    return "\n".join(
        [
            "# Which line comes next? Four choices, made of held-out text; chance is 0.25.",
            f"task: {name}",
            "dataset_path: json",
            "dataset_kwargs:",
            "  data_files:",
            f"    test: {json.dumps(str(path))}",
            "test_split: test",
            "output_type: multiple_choice",
            "doc_to_text: context",
            "doc_to_choice: choices",
            "doc_to_target: label",
            'target_delimiter: ""',
            "metric_list:",
            "  - metric: acc",
            "    aggregation: mean",
            "    higher_is_better: true",
            "  - metric: acc_norm",
            "    aggregation: mean",
            "    higher_is_better: true",
            "metadata:",
            "  version: 1.0",
            "",
        ]
    )
