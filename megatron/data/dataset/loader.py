"""Serve micro-batches from any sample on, with background threads that read ahead.

Reading a sample is one copy out of a memory map, so threads suffice: they hide the time that a disk takes, and there is
nothing to send between processes. The order does not depend on how many there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from megatron.data.dataset.batch import MicroBatch, make_batch
from megatron.data.dataset.gpt_dataset import SampleExtras, Samples
from megatron.data.dataset.sampler import BatchSampler
from megatron.errors import RunError

EXTRA_TYPES = {"labels": np.int64, "rewards": np.float32, "borders": np.bool_, "padding": np.bool_}
AHEAD = 2  # micro-batches read ahead by each thread


class BatchLoader:
    """The micro-batches of one rank.

    Args:
        samples: The data set.
        sampler: The rank's share of it.
        eod: Id that ends a document.
        eod_mask_loss: Positions whose input ends a document have no loss.
        labels: Read labels too, which mark padding and tokens without loss.
        rewards: Read rewards too.
        documents: Give the start of the document of each token.
        padding: Give which tokens are padding.
        workers: Background threads, 0 for none.
        pin_memory: Put batches in page-locked memory.
        prompt: Positions before every sequence for a soft prompt.
        vocab_size: Ids from here on belong to no token; data that holds one is refused.
        again: Start at the first sample whatever was consumed.
    """

    def __init__(
        self,
        samples: Samples,
        sampler: BatchSampler,
        *,
        eod: int,
        eod_mask_loss: bool = False,
        labels: bool = False,
        rewards: bool = False,
        documents: bool = False,
        padding: bool = False,
        workers: int = 0,
        pin_memory: bool = False,
        prompt: int = 0,
        vocab_size: int | None = None,
        again: bool = False,
    ) -> None:
        self.samples = samples
        self._sampler = sampler
        self._eod = eod
        self._eod_mask_loss = eod_mask_loss
        self._documents = documents
        borders = documents or (eod_mask_loss and labels)
        self._extras = {"labels": labels, "rewards": rewards, "borders": borders, "padding": padding}
        self._workers = workers
        self._pin_memory = pin_memory
        self._prompt = prompt
        self._vocab_size = vocab_size
        self._again = again
        self.full_pass: int | None = None
        """Micro batches of a rank that an evaluation takes; None for as many as eval_iters asks for."""

    def __len__(self) -> int:
        """The number of samples that can be served to all ranks together."""
        return len(self.samples)

    def batches(self, consumed_samples: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches after so many samples were consumed by all ranks together, until the samples are used up.

        Starting late costs the same as starting at 0. Raises RunError when more were consumed than there are, and where
        the data holds an id that the vocabulary has not.
        """
        requested = self._sampler.batches(0 if self._again else consumed_samples)
        return self._ahead(requested) if self._workers > 0 else map(self._read, requested)

    def _ahead(self, requested: Iterator[range]) -> Iterator[MicroBatch]:
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="loader")
        pending: deque[Future[MicroBatch]] = deque()
        try:
            for numbers in requested:
                pending.append(pool.submit(self._read, numbers))
                if len(pending) > AHEAD * self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, numbers: range) -> MicroBatch:
        batch = self._made(numbers)
        return batch.pin_memory() if self._pin_memory else batch

    def _made(self, numbers: range) -> MicroBatch:
        shape = (len(numbers), self.samples.sample_length)
        samples = np.empty(shape, np.int64)
        extras: dict[str, np.ndarray] = {
            name: np.zeros(shape, EXTRA_TYPES[name]) for name, requested in self._extras.items() if requested
        }
        for row, number in enumerate(numbers):
            own = SampleExtras(**{name: array[row] for name, array in extras.items()}) if extras else None
            self.samples.read(number, samples[row], own)
        if self._vocab_size is not None:
            self._check(numbers, samples, extras.get("labels"))
        return make_batch(
            torch.from_numpy(samples),
            eod=self._eod,
            eod_mask_loss=self._eod_mask_loss,
            apart=self._documents,
            prompt=self._prompt,
            **{name: torch.from_numpy(array) for name, array in extras.items()},
        )

    def _check(self, numbers: range, samples: np.ndarray, labels: np.ndarray | None) -> None:
        """Raises RunError for an id that is no token's."""
        limit = self._vocab_size
        assert limit is not None
        if int(samples.max()) >= limit or int(samples.min()) < 0:
            read, wrong = samples, (samples >= limit) | (samples < 0)
        elif labels is not None and int(labels.max()) >= limit:
            read, wrong = labels, labels >= limit
        else:
            return
        row, position = np.argwhere(wrong)[0].tolist()
        source, document = self.samples.origin(numbers[row], position)
        token = int(read[row, position])
        dataset = source.tokens if read is samples or source.labels is None else source.labels
        raise RunError.of(
            f"document {document} holds the id {token}, and the tokenizer's ids are 0 to {limit - 1}",
            location=dataset.prefix,
            hint="another tokenizer made this data: give the run that one, or make the data again with the run's own;"
            " new tokens of a checkpoint's tokenizer get rows with finetune: true",
        )
