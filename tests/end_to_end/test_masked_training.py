"""A masked language model from text to checkpoint: preprocessing, training, resuming in the same and another layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.tokenizers import make_tokenizer
from tests.end_to_end.runs import run, run_all, series
from tests.multi_rank import RankFailedError

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"{first}{second}" for first in ("ka", "lo", "mi", "ne", "su") for second in ("ra", "to", "vi", "ze")]
PADDED: dict[str, Any] = {"train_impl": "bert", "pack_impl": "unpacked", "no_weight_tying": False, "num_kv_heads": 4}
PADDED |= {"pos_emb": "learned", "norm": "layernorm", "activation": "gelu", "eval_interval": 4, "train_iters": 9}
PACKED = {**PADDED, "pack_impl": "packed", "bert_binary_head": False, "pos_emb": "rotary", "norm": "rmsnorm"}
FORMS = {"padded": PADDED, "packed": PACKED}
EXACT = ("train/lm_loss", "train/sop_loss", "train/grad_norm", "validation/lm_loss", "validation/sop_loss")


def tool(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "tools" / name), *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Documents of sentences that count up in one word list, so that order and masked words can be learned."""
    folder, generator = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(80):
            sentences = []
            for start in generator.integers(0, len(WORDS)) + np.arange(generator.integers(3, 12)):
                words = [WORDS[(start + step) % len(WORDS)] for step in range(generator.integers(3, 7))]
                sentences.append(" ".join(words).capitalize() + ".")
            file.write(json.dumps({"text": " ".join(sentences)}) + "\n")
    source, vocabulary = str(folder / "text.jsonl"), str(folder / "vocab.txt")
    tool("train_tokenizer.py", "--input", source, "--tokenizer-type", "WordPiece", "--vocab-size", "80",
         "--tokenizer-output-path", vocabulary)  # fmt: skip
    kind = ("--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", vocabulary)
    tool("preprocess_data.py", "--input", source, "--output-prefix", str(folder / "d"), "--split-sentences", *kind)
    return {
        "data_path": str(folder / "d_text_sentence"),
        "split": "90,10,0",
        "tokenizer_type": "BertWordPieceLowerCase",
        "vocab_file": vocabulary,
    }


@pytest.mark.parametrize("form", FORMS)
def test_two_resumes_change_nothing_and_any_layout_continues(form: str, data: dict[str, Any], tmp_path: Path) -> None:
    """With dropout, bit by bit; without it, another layout continues within 1e-5."""
    keys = {**data, **FORMS[form], "hidden_dropout": 0.1, "attention_dropout": 0.1}
    saved = {"save": str(tmp_path / "save"), "load": str(tmp_path / "save"), "checkpoint_factor": 100}
    runs = run_all(
        1, tmp_path, {"full": keys, "first": {**keys, **saved, "exit_interval": 5}, "rest": {**keys, **saved}}
    )
    names = EXACT if form == "padded" else [name for name in EXACT if "sop" not in name]
    for name in names:
        both = series(runs["first"], name) + series(runs["rest"], name)
        assert both == series(runs["full"], name) != [], name

    calm = {**data, **FORMS[form], "train_iters": 6}
    here = {"save": str(tmp_path / "other"), "checkpoint_factor": 100}
    one = run_all(1, tmp_path / "one", {"full": calm, "first": {**calm, **here, "exit_interval": 3}})
    layout = {"model_parallel_size": 2, "zero_optimization": {"stage": 1}}
    other = run(2, tmp_path / "two", **{**calm, **here, "load": here["save"], **layout})
    assert series(other, "train/lm_loss") == pytest.approx(series(one["full"], "train/lm_loss")[3:], rel=1e-5)


@pytest.mark.long
def test_it_learns_words_and_their_order(data: dict[str, Any], tmp_path: Path) -> None:
    """The frequency of words alone gives 2.9 nats a masked token, and a coin 0.69 a sample."""
    keys = {"train_iters": 300, "eval_interval": 300, "eval_iters": 4, "seq_length": 48, "max_position_embeddings": 48}
    keys |= {"train_batch_size": 16, "num_layers": 2, "pos_emb": "rotary"}
    keys |= {"optimizer": {"type": "Adam", "params": {"lr": 0.003}}}
    records = run(1, tmp_path, **{**data, **PADDED, **keys})
    assert series(records, "validation/lm_loss")[-1] < 1.6
    assert series(records, "validation/sop_loss")[-1] < 0.5


def test_a_vocabulary_without_a_mask_is_refused(data: dict[str, Any], tmp_path: Path) -> None:
    pieces = Path(data["vocab_file"]).read_text().replace("[MASK]\n", "")
    (tmp_path / "vocab.txt").write_text(pieces)
    assert (
        "[MASK]" not in make_tokenizer("BertWordPieceLowerCase", vocab_file=str(tmp_path / "vocab.txt")).special_tokens
    )
    with pytest.raises(RankFailedError, match=r"the tokenizer lacks \[MASK\] or <mask>"):
        run(1, tmp_path, **{**data, **PADDED, "vocab_file": str(tmp_path / "vocab.txt")})
