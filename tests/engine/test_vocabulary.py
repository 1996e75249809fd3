"""What a configuration says of the vocabulary is held against the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.runs import make_dataset, run, series
from tests.multi_rank import RankFailedError


def test_rows_that_do_not_follow_from_the_tokenizer_are_refused(tmp_path: Path) -> None:
    prefix = make_dataset(tmp_path)
    with pytest.raises(RankFailedError, match=r"padded_vocab_size = 1024: the embedding has 512 rows, for the 512"):
        run(1, tmp_path, data_path=prefix, train_iters=1, padded_vocab_size=1024)
    records = run(1, tmp_path, data_path=prefix, train_iters=1, padded_vocab_size=512, vocab_size=100)
    assert series(records, "train/lm_loss")
