"""Samples of a task: `[CLS] A [SEP] B [SEP]` and padding, for each answer of a question.

Shapes: s sequence, c answers of a question (1 for classes), b samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron.data.dataset.batch import MicroBatch
from megatron.data.dataset.document_starts import document_starts
from megatron.data.dataset.gpt_dataset import Origin, SampleExtras
from megatron.data.dataset.loader import BatchLoader
from megatron.data.dataset.sampler import BatchSampler
from megatron.data.tasks.rows import UNLABELED, Row
from megatron.tokenizer_info import ClassTokens, EncodingTokenizer

QUESTION_TOKENS = 128
"""Most tokens of a question with its answer, of which a longer one loses the end."""


@dataclass(frozen=True)
class RowEncoder:
    """How a row becomes token ids."""

    tokenizer: EncodingTokenizer
    """Tokenizer of the model."""
    tokens: ClassTokens
    """Its ids of separators and padding."""
    seq_length: int
    """Length of a sample [tokens]."""
    choices: int
    """Sequences of a sample; 1 for classes."""

    def write(self, row: Row, tokens: np.ndarray, types: np.ndarray, starts: np.ndarray) -> None:
        """Writes a row into arrays [c, s].

        Args:
            row: The row.
            tokens: Gets the ids.
            types: Gets the segments.
            starts: Gets True where text or padding begins.
        """
        for index, (text, pair) in enumerate(row.texts):
            first = list(self.tokenizer.encode(text))
            second = [] if pair is None else list(self.tokenizer.encode(pair))
            if self.choices > 1:
                first = first[:QUESTION_TOKENS]
            self._write(first, second, tokens[index], types[index], starts[index])

    def _write(
        self, first: list[int], second: list[int], tokens: np.ndarray, types: np.ndarray, starts: np.ndarray
    ) -> None:
        ids = [self.tokens.cls, *first, self.tokens.sep]
        middle = len(ids)
        between = [self.tokens.sep] if self.tokens.doubled else []
        ids += [*between, *second, self.tokens.sep] if second else []
        if len(ids) > self.seq_length:
            ids = [*ids[: self.seq_length - 1], self.tokens.sep]
        length = len(ids)
        tokens[:length], tokens[length:] = ids, self.tokens.pad
        types[:] = 0
        types[min(middle, length) : length] = 1
        starts[:] = False
        starts[0] = True
        if length < self.seq_length:
            starts[length] = True


class TaskSamples:
    """The rows of some files, as often as asked for, each time in another order; or once in their order."""

    def __init__(
        self,
        rows: Sequence[Any],
        encoding: RowEncoder,
        *,
        samples: int | None = None,
        per_epoch: int = 0,
        seed: int = 0,
    ) -> None:
        """Takes the rows.

        Args:
            rows: Of all files.
            encoding: How they become token ids.
            samples: How many there are; None for each row once, in order.
            per_epoch: How many of the rows an epoch reads; other ones are left out each time.
            seed: Seed of the orders.
        """
        self._rows, self._encoding, self._seed = rows, encoding, seed
        self._samples, self._per_epoch = samples, per_epoch
        self._order: tuple[int, np.ndarray] | None = None
        self.sample_length = encoding.seq_length

    def __len__(self) -> int:
        return len(self._rows) if self._samples is None else self._samples

    def row(self, number: int) -> Any:
        """Returns the row of a sample; None behind the last one of rows that are read once."""
        if self._samples is None:
            return self._rows[number] if number < len(self._rows) else None
        epoch, index = divmod(number, self._per_epoch)
        order = self._order
        if order is None or order[0] != epoch:
            order = self._order = (epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self._rows)))
        return self._rows[int(order[1][index])]

    def read(self, number: int, tokens: np.ndarray, extras: SampleExtras | None = None) -> None:
        """Writes the ids of a sample of one sequence [s]; a loader of tasks reads rows instead."""
        row = self.row(number)
        assert row is not None
        types, starts = np.empty((1, len(tokens)), np.int64), np.empty((1, len(tokens)), bool)
        self._encoding.write(row, tokens[None], types, starts)

    def origin(self, number: int, position: int) -> Origin:
        """Samples of tasks come from no token file; `TaskLoader` makes their ids itself, so none is traced back."""
        raise NotImplementedError


class TaskLoader(BatchLoader):
    """The micro-batches of one rank. The label of a sample is that of the first token of its first sequence."""

    def __init__(
        self,
        samples: TaskSamples,
        sampler: BatchSampler,
        encoding: RowEncoder,
        *,
        types: bool,
        workers: int = 0,
        pin_memory: bool = False,
        again: bool = False,
    ) -> None:
        """Takes the samples of a rank.

        Args:
            samples: The rows.
            sampler: The rank's share of them.
            encoding: How rows become token ids.
            types: Give the segment of each token.
            workers: Background threads, 0 for none.
            pin_memory: Put batches in page-locked memory.
            again: Start at the first sample whatever was consumed, and pad the last batch: all samples are read.
        """
        super().__init__(samples, sampler, eod=0, workers=workers, pin_memory=pin_memory, again=again)
        self._rows, self._encoding, self._types = samples, encoding, types
        self.full_pass = sampler.total // (sampler.micro_batch * sampler.data_size) if again else None

    def _read(self, numbers: range) -> MicroBatch:
        choices, length = self._encoding.choices, self._encoding.seq_length
        shape = (len(numbers), choices, length)
        tokens, types = np.full(shape, self._encoding.tokens.pad, np.int64), np.zeros(shape, np.int64)
        starts = np.zeros(shape, bool)
        labels, counted = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        for index, number in enumerate(numbers):
            row = self._rows.row(number)
            if row is None:
                continue
            self._encoding.write(row, tokens[index], types[index], starts[index])
            if row.label != UNLABELED:
                labels[index, 0, 0], counted[index, 0, 0] = row.label, 1.0
        flat = (len(numbers) * choices, length)
        inputs = torch.from_numpy(tokens.reshape(flat))
        batch = MicroBatch(
            inputs,
            torch.from_numpy(labels.reshape(flat)),
            torch.from_numpy(counted.reshape(flat)),
            document_starts=document_starts(inputs, torch.from_numpy(starts.reshape(flat)), None),
            token_types=torch.from_numpy(types.reshape(flat)) if self._types else None,
        )
        return batch.pin_memory() if self._pin_memory else batch
