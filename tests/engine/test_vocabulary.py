"""What a configuration says of the vocabulary is held against the tokenizer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron.checkpoint.huggingface.model_folder import Folder
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


def test_ids_of_a_model_beyond_its_tokenizer_have_probability_in_training(tmp_path: Path) -> None:
    """With an output matrix of zeros the loss of transformers is the logarithm of the number of ids."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=600, max_position_embeddings=32, **sizes))
    torch.nn.init.zeros_(theirs.lm_head.weight)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.arange(8)[None]
    expected = float(theirs(ids, labels=ids).loss)
    assert expected == pytest.approx(math.log(600), rel=1e-6)
    keys = {
        **Folder.open(tmp_path / "theirs").settings(),
        "data_path": make_dataset(tmp_path),
        "eval_iters": 1,
        "eval_interval": 1,
    }
    keys |= {
        "optimizer": {"type": "Adam", "params": {"lr": 1e-12}},
        "min_lr": 0.0,
        "save": str(tmp_path / "ours"),
        "checkpoint_factor": 1,
    }
    start = {"load": str(tmp_path / "theirs"), "finetune": True, "train_iters": 2, "exit_interval": 1}
    for case in (start, {"load": str(tmp_path / "ours"), "train_iters": 2}):
        records = run(1, tmp_path, **keys, **case)
    assert series(records, "train/lm_loss") == pytest.approx([expected] * 2, rel=1e-6)
    evaluated = series(records, "validation/lm_loss")[-1]
    assert evaluated == pytest.approx(expected, rel=1e-6)
