"""Accuracy of a classifier on each validation file, and its predictions, at each evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron.atomic import write_atomic
from megatron.data.tasks.rows import UNLABELED, Row
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import all_gather_list
from megatron.metrics.reporter import Reporter
from megatron.objectives.classification import ClassScores
from megatron.training.hooks.base import Hook
from megatron.training.run_state import RunState


class TaskScoresHook(Hook):
    """Collects the logits of an evaluation, reports accuracies and writes predictions. Collective."""

    def __init__(
        self,
        scores: ClassScores,
        files: Mapping[str, Sequence[Row]],
        topology: Topology,
        micro_batch: int,
        reporter: Reporter,
        *,
        labels: Sequence[str],
        folder: str | None,
    ) -> None:
        """Creates the hook.

        Args:
            scores: gets the logits of this rank.
            files: name -> rows of each validation file, in the order of the samples.
            topology: layout of the ranks.
            micro_batch: samples of one pass of a rank.
            reporter: receives the accuracies.
            labels: names of the classes; empty for multiple choice, whose answers are numbers.
            folder: for predictions, or None.
        """
        self._scores, self._files, self._topology = scores, files, topology
        self._micro_batch, self._reporter, self._labels = micro_batch, reporter, labels
        self._folder = None if folder is None else Path(folder)

    def before_evaluate(self, state: RunState) -> None:
        self._scores.start()

    def after_evaluate(self, state: RunState) -> bool:
        """A second pass is that of the moving average of the weights, of which only the accuracies are reported."""
        first, *averaged = self._passes()
        self._report("validation", first, state.iteration)
        for logits in averaged:
            self._report("validation_ema", logits, state.iteration)
        if self._folder is not None and self._topology.rank == 0:
            for name, rows, own in self._by_file(first):
                self._write(self._folder / f"iteration_{state.iteration}" / f"{name}.jsonl", rows, own)
        return True

    def _report(self, split: str, logits: np.ndarray, iteration: int) -> None:
        """Reports the accuracy on all labeled samples, and on those of each file where there are several."""
        right, labeled, metrics = 0, 0, {}
        for name, rows, own in self._by_file(logits):
            labels = np.array([row.label for row in rows])
            counted = labels != UNLABELED
            hits, count = int((own.argmax(1) == labels)[counted].sum()), int(counted.sum())
            right, labeled = right + hits, labeled + count
            if count and len(self._files) > 1:
                metrics[f"{split}/accuracy/{name}"] = hits / count
        if labeled:
            self._reporter.evaluation(iteration, split, {f"{split}/accuracy": right / labeled, **metrics})

    def _by_file(self, logits: np.ndarray) -> Iterator[tuple[str, Sequence[Row], np.ndarray]]:
        """Yields the name of each file, its rows and their logits."""
        first = 0
        for name, rows in self._files.items():
            yield name, rows, logits[first : first + len(rows)]
            first += len(rows)

    def _passes(self) -> list[np.ndarray]:
        """Returns the logits of all samples in their order for each pass [samples, classes]; the same on every rank."""
        axes, own = self._topology, self._scores.take()
        mine = None if own is None or not axes.model.is_first else (axes.data.rank, own.numpy())
        of_ranks = dict(found for found in all_gather_list(mine) if found is not None)
        parts = [of_ranks[rank] for rank in sorted(of_ranks)]
        total = sum(map(len, self._files.values()))
        batches = -(-total // (self._micro_batch * len(parts)))
        shape = (-1, batches, self._micro_batch, parts[0].shape[-1])
        together = np.stack([part.reshape(shape) for part in parts], 2)  # [passes, batches, ranks, b, classes]
        return list(together.reshape(len(together), -1, parts[0].shape[-1])[:, :total])

    def _write(self, path: Path, rows: Sequence[Row], logits: np.ndarray) -> None:
        lines = []
        for row, values in zip(rows, logits, strict=True):
            found = int(values.argmax())
            named = [self._labels[number] if self._labels else number for number in (found, row.label)]
            label = {} if row.label == UNLABELED else {"label": named[1]}
            scores = [round(float(value), 6) for value in values]
            lines.append(json.dumps({"id": row.name, "prediction": named[0], **label, "logits": scores}))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "\n".join(lines) + "\n")
