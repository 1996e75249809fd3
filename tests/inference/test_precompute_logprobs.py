"""Log-probabilities as a data set: against float64, item by item, and never twice."""

import numpy
import pytest
import torch

from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import DatasetWriter
from megatron.inference.precompute_logprobs import write_log_probabilities
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config

OVERLAP = 16


def test_every_token_has_its_log_probability(tmp_path):
    engine = SmallEngine(small_config())
    random = numpy.random.default_rng(2)
    items = [random.integers(0, 512, size) for size in (5, 1, SEQUENCE + 1, 20, 3 * SEQUENCE)]
    with DatasetWriter(tmp_path / "text", numpy.dtype(numpy.uint16)) as writer:
        for item in items:
            writer.add_document(item)
    target = str(tmp_path / "text_small")

    def write(writes=True):
        write_log_probabilities(
            engine, str(tmp_path / "text"), target, max_length=SEQUENCE, batch_size=2, overlap=OVERLAP, writes=writes
        )

    write(writes=False)
    assert not list(tmp_path.glob("text_small*"))
    write()
    found = IndexedDataset(target)
    assert len(found) == len(items)
    for item, scores in zip(items, found, strict=True):
        assert scores.dtype == numpy.float32 and len(scores) == len(item) and scores[0] == 0
        for at in range(1, len(item)):
            start = 0 if at <= SEQUENCE else at - SEQUENCE + (OVERLAP - 1 - (at - SEQUENCE - 1) % OVERLAP)
            start = min(start, max(0, len(item) - 1 - SEQUENCE))
            rows = engine.logits(torch.tensor(item[None, start:at]))[0].double().log_softmax(-1)
            assert scores[at] == pytest.approx(rows[-1, item[at]].item(), abs=1e-4), at
    calls = engine.calls
    write()
    assert engine.calls == calls
