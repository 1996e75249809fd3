"""From the files of a task to loaders: one for training, one that reads every validation sample once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron.config.schema.task import TaskSection
from megatron.data.dataset.builder import Data
from megatron.data.dataset.loader import BatchLoader
from megatron.data.dataset.sampler import BatchSampler
from megatron.data.dataset.summary import DataPlan
from megatron.data.tasks.rows import UNLABELED, Row, RowForm, task_files
from megatron.data.tasks.samples import RowEncoder, TaskLoader, TaskSamples
from megatron.errors import ConfigError, RunError


@dataclass(frozen=True)
class TaskData:
    """The rows of a task, read when they are first needed."""

    section: TaskSection
    """Files and their form."""
    encoding: RowEncoder
    """How rows become token ids."""

    @cached_property
    def train(self) -> Mapping[str, list[Any]]:
        """Name -> rows of each training file or folder. Raises RunError for a row without a label."""
        found = self._read(self.section.task_train_data or (), "task_train_data")
        for name, rows in found.items():
            bare = next((row for row in rows if row.label == UNLABELED), None)
            if bare is not None:
                what, hint = f"row {bare.name} has no label", "train on labeled files; task_valid_data may lack labels"
                raise RunError.of(what, key="task_train_data", location=name, hint=hint)
        return found

    @cached_property
    def valid(self) -> Mapping[str, list[Any]]:
        """Name -> rows of each validation file or folder."""
        return self._read(self.section.task_valid_data or (), "task_valid_data")

    def _read(self, names: Sequence[str], key: str) -> dict[str, list[Row]]:
        section = self.section
        assert section.task_format is not None
        form = RowForm(
            section.task_format, section.task_labels or (), section.task_choices or 0, section.task_fields or {}
        )
        files = [task_files([name], section.task_format, key) for name in names]
        rows = [[row for path in own for row in form.read(path)] for own in files]
        return dict(zip(names_of_files(names), rows, strict=True))

    def samples_per_epoch(self, batch: int) -> int:
        """Returns how many rows of the training files an epoch reads, a multiple of the batch.

        Raises ConfigError for fewer rows than a batch. batch: samples of a step.
        """
        rows = sum(map(len, self.train.values()))
        if rows < batch:
            what, hint = f"the task has {rows} rows to train on, and a step takes {batch}", "lower train_batch_size"
            raise ConfigError.of(what, key="train_batch_size", value=batch, hint=hint)
        return rows // batch * batch

    def order_facts(self, seed: int) -> dict[str, Any]:
        """Returns what decides which sample is number k, by the key that decides it. seed: of the orders."""
        sets = [[len(rows), self.digest(rows)] for rows in self.train.values()]
        return {"seed": seed, "seq_length": self.encoding.seq_length, "task_train_data": sets}

    def build(
        self,
        *,
        seed: int,
        batch: int,
        micro_batch: int,
        data_rank: int,
        data_size: int,
        train_samples: int,
        types: bool,
        workers: int,
    ) -> Data:
        """Returns the loaders of one data-parallel rank.

        Args:
            seed: Seed of the orders.
            batch: Samples of a step.
            micro_batch: Samples of one pass of a rank.
            data_rank: Its place among the data-parallel ranks.
            data_size: Number of data-parallel ranks.
            train_samples: Samples of the run.
            types: Give the segment of each token.
            workers: Background threads of a loader.
        """
        started = time.monotonic()
        rows: list[Any] = [row for each in self.train.values() for row in each]
        held: list[Any] = [row for each in self.valid.values() for row in each]
        train = TaskSamples(
            rows, self.encoding, samples=train_samples, per_epoch=self.samples_per_epoch(batch), seed=seed
        )
        valid = TaskSamples(held, self.encoding)
        step = micro_batch * data_size
        common: dict[str, Any] = {"types": types, "workers": workers, "pin_memory": torch.cuda.is_available()}

        def loader(samples: TaskSamples, total: int, *, again: bool) -> BatchLoader:
            sampler = BatchSampler(total, micro_batch, data_rank, data_size)
            return self.loader(samples, sampler, again=again, **common)

        plan = DataPlan(
            None, None, None, time.monotonic() - started, notes=tuple(self.lines()), order=self.order_facts(seed)
        )
        total = -(-len(held) // step) * step
        return Data(
            loader(train, train_samples, again=False) if rows else None,
            loader(valid, total, again=True) if held else None,
            None,
            plan,
        )

    def loader(self, samples: TaskSamples, sampler: BatchSampler, **settings: Any) -> BatchLoader:
        """Returns the loader of a rank. settings: those of a TaskLoader."""
        return TaskLoader(samples, sampler, self.encoding, **settings)

    def digest(self, rows: Sequence[Any]) -> str:
        """Returns a fingerprint of rows."""
        found = hashlib.sha256()
        for row in rows:
            found.update(repr((row.texts, row.label)).encode())
        return found.hexdigest()[:16]

    def lines(self) -> list[str]:
        """Returns what the run reads, a line a file."""
        sets = {"train": self.train, "valid": self.valid}
        alone = ", none of which has a label: they are predicted alone"
        lines = []
        for split, own in sets.items():
            for name, rows in own.items():
                bare = all(row.label == UNLABELED for row in rows)
                lines.append(f"{split}: {len(rows):,} samples from {name}{alone if bare else ''}")
        return lines


def names_of_files(given: Sequence[str]) -> list[str]:
    """Returns a name for each file or folder: its stem, with its folder where two are alike, and then a number."""
    paths = [Path(name) for name in given]
    stems = [path.stem for path in paths]
    longer = [path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}-{path.stem}" for path in paths]
    return [name if longer.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(longer)]
