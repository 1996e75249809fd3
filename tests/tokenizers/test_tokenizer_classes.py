"""Folders without a tokenizer.json whose class knows what the files do not say: the ids are those of transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from sentencepiece import SentencePieceTrainer
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3_5Tokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from megatron.errors import ConfigError
from megatron.tokenizer_info import QWEN2, QWEN3_5
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.from_folder import find_tokenizer
from tests.tokenizers import made
from tools import convert_from_hf, convert_to_hf

CODE = "    def read(self, name):\n        return self.name[12345:] + 'x'  # don't\r\n\n\t\tself.values.items()\n"
TEXTS = [
    CODE,
    "It's 2024,  don't 12345\n\n  go",
    "cafe\u0301 na\u0131\u0308ve",
    "\u0939\u093f\u0928\u094d\u0926\u0940 12",
    " \u00a0x\n",
]
MARKS = ["<|im_start|>", "<|im_end|>"]


def write(folder: Path, pattern: str, settings: dict[str, object], model: dict[str, object] | None = None) -> Path:
    """A byte-level tokenizer of that pattern, as the slow classes of transformers 4 write it."""
    tokenizer = made.byte_level_by(pattern, TEXTS)
    folder.mkdir()
    tokenizer.model.save(str(folder))
    size = tokenizer.get_vocab_size()
    added = {text: size + number for number, text in enumerate(["<|endoftext|>", *MARKS])}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    settings = {"eos_token": "<|endoftext|>", "additional_special_tokens": MARKS, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if model is not None:
        (folder / "config.json").write_text(json.dumps(model))
    return folder


def require_their_ids(folder: Path, theirs: PreTrainedTokenizerBase) -> None:
    expected = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    ours = make_tokenizer("PretrainedFromHF", vocab_file=str(folder))
    assert [ours.encode(text) for text in TEXTS] == expected
    taken = find_tokenizer(folder, complete=True)
    assert taken.tokenizer is not None, taken.reason
    assert (folder / "tokenizer.json").is_file()
    assert [taken.tokenizer.encode(text) for text in TEXTS] == expected
    assert taken.tokenizer.decode(expected[0]) == CODE
    chat = f"{MARKS[0]}user\n{CODE}{MARKS[1]}"
    assert taken.tokenizer.encode_with_special_tokens(chat) == theirs(chat, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen2TokenizerFast"])
def test_the_class_that_the_folder_names(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", QWEN2, {"tokenizer_class": name})
    require_their_ids(folder, AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe", "qwen3_next"])
def test_the_class_of_the_model_where_none_is_named(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", QWEN2, {}, {"model_type": kind})
    require_their_ids(folder, AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("named", [({"tokenizer_class": "Qwen3_5Tokenizer"}, {}), ({}, {"model_type": "qwen3_5_moe"})])
def test_qwen_3_5(named: tuple[dict[str, object], dict[str, object]], tmp_path: Path) -> None:
    """AutoTokenizer gives its class a tokenizer.json alone, so the class gets the two files here."""
    folder = write(tmp_path / "folder", QWEN3_5, *named)
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    theirs = Qwen3_5Tokenizer(vocab=json.loads((folder / "vocab.json").read_text()), merges=merges)
    theirs.add_special_tokens({"additional_special_tokens": MARKS})
    require_their_ids(folder, theirs)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast"])
def test_gpt2_s_classes_split_as_it_does(name: str, tmp_path: Path) -> None:
    folder = made.gpt2(tmp_path / "folder", tokenizer_class=name)
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = [theirs(text)["input_ids"] for text in TEXTS]
    for complete in (False, True):
        ours = find_tokenizer(folder, complete=complete)
        assert ours.keys["tokenizer_type"] == "GPT2BPETokenizer"
        assert ours.tokenizer is not None
        assert [ours.tokenizer.encode(text) for text in TEXTS] == expected


def test_a_class_whose_pattern_is_unknown_is_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", QWEN2, {"tokenizer_class": "ElsewhereTokenizer"})
    with pytest.raises(ConfigError, match="ElsewhereTokenizer splits texts by a pattern of its own") as caught:
        make_tokenizer("PretrainedFromHF", vocab_file=str(folder))
    assert "write a tokenizer.json" in str(caught.value)
    for complete in (False, True):
        assert "ElsewhereTokenizer splits texts" in find_tokenizer(folder, complete=complete).reason


SENTINELS = [f"<extra_id_{number}>" for number in range(100)]
T5_SETTINGS = {
    "as of T5 1.1": {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "additional_special_tokens": SENTINELS},
    "the model's type alone": None,
}


@pytest.mark.parametrize("name", T5_SETTINGS)
def test_t5_s_sentinels_are_behind_its_sentencepiece_model(name: str, tmp_path: Path) -> None:
    """There and back by the tools: the ids of AutoTokenizer on the folder that came, with the end that T5 writes."""
    theirs, ours, back = (tmp_path / part for part in ("theirs", "ours", "back"))
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=400, **sizes)).save_pretrained(theirs)
    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "model_type": "unigram", "vocab_size": 300}
    SentencePieceTrainer.train(
        sentence_iterator=iter(made.LINES), model_writer=model, hard_vocab_limit=False, minloglevel=2, **ids
    )
    (theirs / "spiece.model").write_bytes(model.getvalue())
    if T5_SETTINGS[name] is not None:
        (theirs / "tokenizer_config.json").write_text(json.dumps(T5_SETTINGS[name]))
    assert convert_from_hf.main(["--input-dir", str(theirs), "--output-dir", str(ours)]) == 0
    assert convert_to_hf.main(["--input-dir", str(ours), "--output-dir", str(back)]) == 0
    first, second = (AutoTokenizer.from_pretrained(folder) for folder in (theirs, back))
    for text in ("two  words <extra_id_0> x <extra_id_99>", "a<extra_id_5> b ", *TEXTS[1:3]):
        assert second(text)["input_ids"] == first(text)["input_ids"]
    keys = yaml.safe_load((ours / "model.yml").read_text())
    tokenizer = make_tokenizer(keys["tokenizer_type"], vocab_file=keys["vocab_file"])
    assert tokenizer.special_tokens["<extra_id_0>"] == len(first) - 1


@pytest.mark.parametrize("settings", [{"tokenizer_class": "RobertaTokenizer"}, {}])
def test_roberta_s_class_puts_tokens_around_texts_and_pairs(settings: dict[str, object], tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", QWEN2, settings, {"model_type": "roberta"})
    vocabulary = json.loads((folder / "vocab.json").read_text())
    names = {
        "<s>": "cls_token",
        "</s>": "sep_token",
        "<pad>": "pad_token",
        "<mask>": "mask_token",
        "<unk>": "unk_token",
    }
    vocabulary |= {token: len(vocabulary) + number for number, token in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "added_tokens.json").unlink()
    said = {name: token for token, name in names.items()} | {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **said}))
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = [theirs(*texts)["input_ids"] for texts in ((CODE,), ("a <mask> b", "don't 12"))]
    assert find_tokenizer(folder, complete=True).tokenizer is not None
    made_of_it = PreTrainedTokenizerFast.from_pretrained(folder)
    assert [made_of_it(*texts)["input_ids"] for texts in ((CODE,), ("a <mask> b", "don't 12"))] == expected
