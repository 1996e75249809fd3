"""What a configuration says of the vocabulary is held against the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.checkpoint.load.vocabulary import Rows
from megatron.distributed.mesh import Topology
from megatron.engine import vocabulary
from megatron.tokenizers.char_level import CharLevelTokenizer
from tests.end_to_end.runs import make_dataset, run, series
from tests.inference.small_model import small_config
from tests.multi_rank import RankFailedError


def test_rows_that_do_not_follow_from_the_tokenizer_are_refused(tmp_path: Path) -> None:
    prefix = make_dataset(tmp_path)
    with pytest.raises(RankFailedError, match=r"padded_vocab_size = 1024: the embedding has 512 rows, for the 512"):
        run(1, tmp_path, data_path=prefix, train_iters=1, padded_vocab_size=1024)
    records = run(1, tmp_path, data_path=prefix, train_iters=1, padded_vocab_size=512, vocab_size=100)
    assert series(records, "train/lm_loss")


@pytest.mark.parametrize(
    ("vocab_size", "rows", "warned"),
    [
        (None, 512, False),
        (512, 640, False),
        (600, 600, False),  # taken over: more rows than tokens
        (600, 601, False),  # and padded for the tensor-parallel degree
        (601, 604, False),
        (640, 512, True),  # of a run of its own, whose rows follow from the tokenizer
        (100, 512, True),
    ],
)
def test_a_size_that_the_model_has_rows_for_has_an_effect(monkeypatch, caplog, vocab_size, rows, warned) -> None:
    """The tokenizer has 512 tokens."""
    monkeypatch.setattr(vocabulary, "vocabulary_rows", lambda *_, **__: Rows(rows, 512))
    vocabulary.build_vocabulary(small_config(vocab_size=vocab_size), Topology.single(), CharLevelTokenizer())
    assert ("has no effect" in caplog.text) == warned
