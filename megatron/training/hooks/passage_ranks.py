"""Ranks of the right passages among all passages of the validation files, at each evaluation (arXiv:2004.04906)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron.data.retrieval.questions import Passage
from megatron.distributed.mesh import Topology
from megatron.distributed.process_group import all_gather_list
from megatron.metrics.reporter import Reporter
from megatron.objectives.classification import ClassScores
from megatron.objectives.retrieval import ranks_of
from megatron.training.hooks.base import Hook
from megatron.training.run_state import RunState

BLOCK = 256
"""Questions that are compared with all passages at once."""


class PassageRanksHook(Hook):
    """Collects the embeddings of an evaluation and reports the ranks of the right passages. Collective."""

    def __init__(
        self,
        scores: ClassScores,
        passages: Sequence[Sequence[Passage]],
        topology: Topology,
        micro_batch: int,
        most: int,
        reporter: Reporter,
        *,
        tops: Sequence[int],
    ) -> None:
        """Creates the hook.

        Args:
            scores: gets the embeddings of this rank.
            passages: of each question in the order of the samples, the right one first.
            topology: layout of the ranks.
            micro_batch: questions of one pass of a rank.
            most: rows of passages that a question has in a batch.
            reporter: receives the ranks.
            tops: numbers of first passages among which the right one is counted.
        """
        self._scores, self._passages, self._topology = scores, passages, topology
        self._micro_batch, self._most, self._reporter, self._tops = micro_batch, most, reporter, tops

    def before_evaluate(self, state: RunState) -> None:
        self._scores.start()

    def after_evaluate(self, state: RunState) -> bool:
        """A second pass is that of the moving average of the weights."""
        for split, (questions, passages) in zip(("validation", "validation_ema"), self._passes(), strict=False):
            found = pool_ranks(questions, passages, self._passages)
            metrics = {f"pool_top{top}_accuracy": float((found < top).float().mean()) for top in self._tops}
            metrics["pool_average_rank"] = float(found.float().mean())
            named = {f"{split}/{name}": value for name, value in metrics.items()}
            self._reporter.evaluation(state.iteration, split, named)
        return True

    def _passes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the embeddings of questions [n, d] and of their passages [n, most, d] in order, for each pass."""
        axes, own = self._topology, self._scores.take()
        mine = None if own is None or not axes.model.is_first else (axes.data.rank, own.numpy())
        of_ranks = dict(found for found in all_gather_list(mine) if found is not None)
        parts = [torch.from_numpy(of_ranks[rank]) for rank in sorted(of_ranks)]
        rows, total = self._micro_batch * (1 + self._most), len(self._passages)
        batches = -(-total // (self._micro_batch * len(parts)))
        together = torch.stack([part.view(-1, batches, rows, part.shape[-1]) for part in parts], 2)
        for each in together:  # [batches, ranks, rows, d]
            questions, passages = each.split([self._micro_batch, rows - self._micro_batch], dim=2)
            width = each.shape[-1]
            yield questions.reshape(-1, width)[:total], passages.reshape(-1, self._most, width)[:total]


def pool_ranks(questions: Tensor, passages: Tensor, texts: Sequence[Sequence[Passage]]) -> Tensor:
    """Returns the rank of each question's first passage among those of all questions, 0 for the best [n].

    A passage that several questions have is one.

    Args:
        questions: embeddings [n, d].
        passages: embeddings of each question's passages [n, most, d].
        texts: the passages of each question.
    """
    numbers: dict[Passage, int] = {}
    rows: list[Tensor] = []
    for number, own in enumerate(texts):
        for position, passage in enumerate(own):
            if passage not in numbers:
                numbers[passage] = len(rows)
                rows.append(passages[number, position])
    pool = torch.stack(rows)
    right = torch.tensor([numbers[own[0]] for own in texts])
    blocks = zip(questions.split(BLOCK), right.split(BLOCK), strict=True)
    return torch.cat([ranks_of(part @ pool.t(), own) for part, own in blocks])
