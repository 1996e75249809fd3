"""A folder whose tokenizer has more tokens than the model has rows: no text reads a row that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.checkpoint.load.loader import WeightFiles
from megatron.config import Config, Resources, resolve
from megatron.data.indexed.metadata import card_path
from megatron.errors import RunError
from megatron.evaluation.lm_eval_model import read_text as read_for_evaluation
from megatron.inference.runner import generate
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.vocab_limit import BoundedTokenizer
from megatron.training.trainer import train
from tests.checkpoint.huggingface.tokenized import FOLDERS
from tests.end_to_end.runs import NeverStop
from tools import convert_from_hf, preprocess_data

ADDED = ("<|tool|>", "<|/tool|>")
Keys = dict[str, Any]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Keys]:
    """The folder, whose tokenizer.json has two tokens more than the embedding has rows, and the keys of its import."""
    folder = tmp_path_factory.mktemp("imported")
    FOLDERS["llama 3"](folder / "theirs")
    path = folder / "theirs" / "tokenizer.json"
    content = json.loads(path.read_text())
    rows = json.loads((folder / "theirs" / "config.json").read_text())["vocab_size"]
    assert max(token["id"] for token in content["added_tokens"]) == rows - 1
    like = dict(content["added_tokens"][-1])
    content["added_tokens"] += [{**like, "id": rows + at, "content": text} for at, text in enumerate(ADDED)]
    path.write_text(json.dumps(content))
    arguments = ["--input-dir", str(folder / "theirs"), "--output-dir", str(folder / "ours")]
    assert convert_from_hf.main(arguments) == 0
    return folder, yaml.safe_load((folder / "ours" / "model.yml").read_text())


def config_of(keys: Keys, **more: Any) -> Config:
    return resolve([], {**keys, **more}, Resources(1)).config


def continued(keys: Keys, load: Path, prompt: str, folder: Path) -> str | None:
    (folder / "prompts.txt").write_text(f"{prompt}\n")
    reported = {"sample_input_file": str(folder / "prompts.txt"), "sample_output_file": str(folder / "out.jsonl")}
    generate(config_of(keys, load=str(load), maximum_tokens=2, user_script="generate.py", **reported))
    text: str | None = json.loads((folder / "out.jsonl").read_text())["text"]
    return text


@pytest.mark.parametrize("where", ["ours", "theirs"])
def test_a_prompt_that_spells_a_token_without_a_row_is_refused(
    where: str, imported: tuple[Path, Keys], tmp_path: Path
) -> None:
    folder, keys = imported
    assert continued(keys, folder / where, "the quick", tmp_path) is not None
    with pytest.raises(RunError, match=r"the token \d+ \('<\|tool\|>'\), and the model knows the ids 0 to"):
        continued(keys, folder / where, "the <|tool|> quick", tmp_path)


def test_training_refuses_its_data_or_adds_its_rows(imported: tuple[Path, Keys], tmp_path: Path) -> None:
    folder, keys = imported
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "the quick <|tool|> brown fox jumps over <|/tool|> the lazy dog"}\n' * 60)
    arguments = ["--input", str(text), "--output-prefix", str(tmp_path / "data"), "--parse-special-tokens"]
    arguments += ["--tokenizer-type", keys["tokenizer_type"], "--vocab-file", keys["vocab_file"], "--append-eod"]
    assert preprocess_data.main(arguments) == 0
    assert card_path(tmp_path / "data_text_document").is_file()
    reported: Keys = {
        "data_path": str(tmp_path / "data_text_document"),
        "load": str(folder / "ours"),
        "save": str(tmp_path / "saved"),
        "checkpoint_factor": 2,
        "train_iters": 2,
        "train_batch_size": 2,
        "seq_length": 16,
        "eval_iters": 0,
        "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
        "lr_decay_style": "constant",
        "precision": "fp32",
        "user_script": "train.py",
    }
    with pytest.raises(RunError, match=rf"holds the id \d+, and the tokenizer's ids are 0 to {keys['vocab_size'] - 1}"):
        train(config_of(keys, **reported, no_load_optim=True), NeverStop())
    train(config_of(keys, **reported, finetune=True), NeverStop())
    (shard,) = WeightFiles.open(tmp_path / "saved" / "global_step2").shards("0.word_embeddings.weight")
    assert shard.shape[0] == keys["vocab_size"] + len(ADDED)
    assert continued(keys, tmp_path / "saved", "the <|tool|> quick", tmp_path) is not None


def test_every_way_of_encoding_is_bounded(imported: tuple[Path, Keys]) -> None:
    _, keys = imported
    full = make_tokenizer(keys["tokenizer_type"], vocab_file=keys["vocab_file"])
    bounded = BoundedTokenizer(full, keys["vocab_size"])
    assert bounded.vocab_size == keys["vocab_size"] + len(ADDED)
    assert read_for_evaluation(bounded, "the quick") == read_for_evaluation(full, "the quick")
    for text in ADDED:
        with pytest.raises(RunError, match="the model knows the ids"):
            read_for_evaluation(bounded, f"the {text}")
        assert bounded.encode(text) == full.encode(text), "spelt out, it has rows"
    lower = BoundedTokenizer(full, min(full.encode("the quick")) + 1)
    for encode in (lower.encode, lambda text: lower.encode_batch([text]), lambda text: lower.encode_arrays([text])):
        with pytest.raises(RunError, match="the model knows the ids"):
            encode("the quick")
