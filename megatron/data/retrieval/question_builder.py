"""From files of questions and passages to loaders.

Shapes: q questions, p passages, s sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from megatron.config.derived.retrieval import DPR, passages_of_sample
from megatron.config.schema.retrieval import RetrievalSection
from megatron.data.dataset.batch import MicroBatch
from megatron.data.dataset.loader import BatchLoader
from megatron.data.dataset.sampler import BatchSampler
from megatron.data.retrieval.questions import Passage, Question, read_questions
from megatron.data.retrieval.rows import framed, retrieval_batch, write_row
from megatron.data.tasks.builder import TaskData, names_of_files
from megatron.data.tasks.rows import task_files
from megatron.data.tasks.samples import RowEncoder, TaskLoader, TaskSamples


@dataclass(frozen=True)
class QuestionData(TaskData):
    """Questions and their passages, read when they are first needed."""

    retrieval: RetrievalSection
    """Numbers of passages."""
    seed: int
    """Seed of the choice of negatives."""
    without: dict[str, int] = field(default_factory=dict, compare=False)
    """Name of a file -> its questions without a right passage."""

    @cached_property
    def train(self) -> dict[str, list[Question]]:
        """Name -> questions of each training file."""
        return self._questions(self.section.task_train_data or (), "task_train_data")

    @cached_property
    def valid(self) -> dict[str, list[Question]]:
        """Name -> questions of each validation file."""
        return self._questions(self.section.task_valid_data or (), "task_valid_data")

    @property
    def valid_passages(self) -> list[list[Passage]]:
        """The passages of each validation sample, the right one first."""
        questions = [question for own in self.valid.values() for question in own]
        return [chosen_passages(each, self.retrieval, valid=True) for each in questions]

    def loader(self, samples: TaskSamples, sampler: BatchSampler, **settings: Any) -> BatchLoader:
        """Returns the loader of a rank. settings: those of a TaskLoader; `again` is true of the validation loader."""
        return QuestionLoader(samples, sampler, self.encoding, **settings, retrieval=self.retrieval, seed=self.seed)

    def digest(self, rows: Sequence[Any]) -> str:
        """Returns a fingerprint of questions."""
        found = hashlib.sha256()
        for row in rows:
            found.update(repr(row).encode())
        return found.hexdigest()[:16]

    def order_facts(self, seed: int) -> dict[str, Any]:
        """Returns what decides which sample is number k, by the key that decides it. seed: of the orders."""
        section = self.retrieval
        return super().order_facts(seed) | {
            "retrieval_hard_negatives": section.retrieval_hard_negatives,
            "retrieval_other_negatives": section.retrieval_other_negatives,
        }

    def lines(self) -> list[str]:
        """Returns what the run reads, a line a file."""
        found = []
        for split, own in {"train": self.train, "valid": self.valid}.items():
            for name, rows in own.items():
                left = f", {self.without[name]:,} without a right passage are left out" if self.without[name] else ""
                found.append(f"{split}: {len(rows):,} questions from {name}{left}")
        return found

    def _questions(self, names: Sequence[str], key: str) -> dict[str, list[Question]]:
        found: dict[str, list[Question]] = {}
        for name, given in zip(names_of_files(names), names, strict=True):
            read = [read_questions(path) for path in task_files([given], DPR, key)]
            found[name] = [question for questions, _ in read for question in questions]
            self.without[name] = sum(bare for _, bare in read)
        return found


def chosen_passages(
    question: Question, section: RetrievalSection, *, valid: bool = False, random: np.random.Generator | None = None
) -> list[Passage]:
    """Returns the passages of a sample: the right one, hard negatives, other negatives.

    In training negatives are chosen at random, and where hard ones lack there are others in their place; a validation
    sample has the first ones of each.

    Args:
        question: the question.
        section: numbers of passages.
        valid: for a validation sample.
        random: of a training sample.
    """
    if valid or random is None:
        hard = question.hard[: section.retrieval_valid_hard_negatives]
        return [question.positive, *hard, *question.other[: section.retrieval_valid_other_negatives]]
    hard = _drawn(question.hard, section.retrieval_hard_negatives, random)
    missing = section.retrieval_hard_negatives - len(hard)
    return [question.positive, *hard, *_drawn(question.other, section.retrieval_other_negatives + missing, random)]


def _drawn(passages: tuple[Passage, ...], count: int, random: np.random.Generator) -> tuple[Passage, ...]:
    order = random.permutation(len(passages))[:count] if count else ()
    return tuple(passages[index] for index in order)


class QuestionLoader(TaskLoader):
    """The micro-batches of one rank: questions, then the passages of each."""

    def __init__(
        self,
        samples: TaskSamples,
        sampler: BatchSampler,
        encoding: RowEncoder,
        *,
        retrieval: RetrievalSection,
        seed: int,
        again: bool = False,
        **settings: Any,
    ) -> None:
        """Takes the samples of a rank.

        Args:
            samples: The questions.
            sampler: The rank's share of them.
            encoding: How texts become token ids.
            retrieval: Numbers of passages.
            seed: Seed of the choice of negatives.
            again: Start at the first sample whatever was consumed, and pad the last batch: all samples are read.
            settings: Further settings of a TaskLoader.
        """
        super().__init__(samples, sampler, encoding, again=again, **settings)
        self._retrieval, self._seed, self._valid = retrieval, seed, again
        self._passages = passages_of_sample(DPR, retrieval, valid=again)

    def _read(self, numbers: range) -> MicroBatch:
        queries, each, length = len(numbers), self._passages, self._encoding.seq_length
        shape = (queries * (1 + each), length)
        tokens, borders = np.full(shape, self._encoding.tokens.pad, np.int64), np.zeros(shape, bool)
        right, real = np.full(queries, -1), np.zeros(queries * each, bool)
        for row, number in enumerate(numbers):
            question: Question | None = self._rows.row(number)
            if question is None:
                continue
            random = np.random.default_rng((self._seed, number))
            self._write(tokens[row], borders[row], question.text, None)
            right[row] = row * each
            passages = chosen_passages(question, self._retrieval, valid=self._valid, random=random)
            for position, passage in enumerate(passages, row * each):
                self._write(tokens[queries + position], borders[queries + position], passage.text, passage.title)
                real[position] = True
        batch = retrieval_batch(tokens, borders, right, real, types=self._types)
        return batch.pin_memory() if self._pin_memory else batch

    def _write(self, row: np.ndarray, borders: np.ndarray, text: str, title: str | None) -> None:
        encode, ids = self._encoding.tokenizer.encode, self._encoding.tokens
        named = encode(title) if title else None
        write_row(row, borders, framed(ids, encode(text), named, len(row)), ids.pad)
