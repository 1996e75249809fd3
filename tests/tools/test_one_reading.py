"""Data, prompts and the exported folder have the same ids of every text, whatever a .model would do to it.

`transformers` reads both folders, before and behind the run.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.round_trip import notes
from megatron.tokenizers.to_folder import portable
from tests.checkpoint.huggingface.tokenized import READ, TEXT, llama_class, sentence_piece, write_model
from tests.tools.test_exported_reading import there_and_back
from tools import convert_from_hf, preprocess_data

RULES: dict[str, dict[str, Any]] = {
    "as it is": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "single blanks": {"normalization_rule_name": "identity", "remove_extra_whitespaces": True},
    "characters": {"normalization_rule_name": "nfkc", "remove_extra_whitespaces": False},
    "both": {"normalization_rule_name": "nmt_nfkc_cf", "remove_extra_whitespaces": True},
}
CLASSES: dict[str, dict[str, Any]] = {
    "LLaMA's": {"tokenizer_class": "LlamaTokenizer"},
    "always a blank": {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
    "no blank": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
    "Code LLaMA's": {"tokenizer_class": "CodeLlamaTokenizer"},
}
DOCUMENTS = [
    *("def f(x):\n    return  x + 1\n", "x = 1\n\n\n  y", "plain text here", "  lead", " a", "\n\t the fox \n"),
    *("\ufb01ne \uff11\uff12 Caf\u00e9", "e\u0301 \u2026 \u00bd", "spelt </s> here", "\u2581x"),
]


def model_file(path: Path, algorithm: str = "bpe", **rules: Any) -> Path:
    made = io.BytesIO()
    marks = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "byte_fallback": True, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=made,
        vocab_size=340,
        model_type=algorithm,
        minloglevel=2,
        **marks,
        **rules,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(made.getvalue())
    return path


def data_of(folder: Path, model: Path, documents: list[str]) -> list[list[int]]:
    """What the program that prepares data writes, without the ends of documents."""
    lines = folder / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    arguments = ["--input", str(lines), "--output-prefix", str(folder / "data"), "--append-eod"]
    arguments += ["--tokenizer-type", "SPMTokenizer", "--vocab-file", str(model)]
    assert preprocess_data.main(arguments) == 0
    found: list[list[int]] = [[]]
    for token in np.fromfile(folder / "data_text_document.bin", np.uint16).tolist():
        if token == 2:
            found.append([])
        else:
            found[-1].append(token)
    return found[:-1]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("kind", CLASSES)
def test_data_prompts_and_exports_are_read_as_llamas_class_does(kind: str, rules: str, tmp_path: Path) -> None:
    sentence_piece(tmp_path / "theirs", **CLASSES[kind])
    model_file(tmp_path / "theirs" / "tokenizer.model", **RULES[rules])
    back, run = there_and_back(tmp_path)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "theirs", back))
    written = data_of(tmp_path, tmp_path / "ours" / "tokenizer" / "tokenizer.model", DOCUMENTS)
    for text, data in zip(DOCUMENTS, written, strict=True):
        assert run.encode(text) == run.encode_batch([text])[0] == data, text
        if "</s>" in text:
            continue
        assert data == before.encode(text, add_special_tokens=False), text
        assert data == after.encode(text, add_special_tokens=False), text
        assert data == run.encode_with_special_tokens(text), text
    for text in READ:
        ids = run.encode_with_special_tokens(text)
        assert ids == before.encode(text, add_special_tokens=False), text
        assert ids == after.encode(text, add_special_tokens=False), text


SYMBOLS = ["<tool>", "superlong", "<|im_start|>", "the fox", "\n"]
SPELT = [
    *("<tool>", "<tool>x", " <tool>", "x<tool>y <tool> z", "</s><tool> a", "a<|im_start|><|im_start|> b"),
    *("the fox is the fox", "superlongsuperlong x", "a word superlong", "fox\n\n\tthe", "<|im_start|>the\nfox</s>"),
]


@pytest.mark.parametrize("kind", CLASSES)
def test_user_defined_symbols_are_found_as_llamas_class_finds_them(kind: str, tmp_path: Path) -> None:
    """Before blanks are put anywhere, and with the blanks that they have; the library puts one before the first."""
    sentence_piece(tmp_path / "theirs", **CLASSES[kind])
    path = model_file(tmp_path / "theirs" / "tokenizer.model", user_defined_symbols=SYMBOLS)
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()
    write_model(tmp_path / "theirs", size, bos_token_id=1, eos_token_id=2)
    back, run = there_and_back(tmp_path)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "theirs", back))
    for text in SPELT:
        ids = run.encode_with_special_tokens(text)
        assert ids == before.encode(text, add_special_tokens=False), text
        assert ids == after.encode(text, add_special_tokens=False), text
        assert run.decode(ids) == before.decode(ids, skip_special_tokens=True), text
        if "</s>" not in text:
            assert run.encode(text) == run.encode_batch([text])[0] == ids, text


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@pytest.mark.parametrize("config", [None, {"tokenizer_class": "PreTrainedTokenizerFast"}])
def test_without_the_class_all_are_read_by_the_model_alone(
    config: dict[str, Any] | None, algorithm: str, rules: str, tmp_path: Path
) -> None:
    """Each stretch of text between special tokens, as the classes of releases before 5 read it."""
    path = model_file(tmp_path / "tokenizer.model", algorithm, **RULES[rules])
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    run = make_tokenizer("SPMTokenizer", vocab_file=str(path))
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    content = portable("SPMTokenizer", str(path), None).content
    assert content is not None
    exported = FastTokenizer.from_str(content)
    for text in DOCUMENTS:
        assert run.encode(text) == model.encode(text), text
        assert run.encode_with_special_tokens(text) == exported.encode(text, add_special_tokens=False).ids, text
    parted = "the fox</s>  over \n"
    assert run.encode_with_special_tokens(parted) == [*model.encode("the fox"), 2, *model.encode("  over \n")]
    assert exported.encode(parted, add_special_tokens=False).ids == run.encode_with_special_tokens(parted)


@pytest.mark.parametrize("flags", [{}, {"legacy": True}, {"add_prefix_space": False}])
def test_a_tokenizer_file_under_llamas_class_trains_on_what_prompts_are(flags: dict[str, Any], tmp_path: Path) -> None:
    """The file's own normalizer puts a blank before every text, also before one that begins with a blank."""
    llama_class(tmp_path, full=True, **flags)
    run, theirs = make_tokenizer("PretrainedFromHF", vocab_file=str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    for text in DOCUMENTS:
        if "</s>" in text:
            assert 2 not in run.encode(text)
            continue
        ids = theirs.encode(text, add_special_tokens=False)
        assert run.encode(text) == run.encode_batch([text])[0] == run.encode_arrays([text])[0].tolist() == ids, text
        assert run.encode_with_special_tokens(text) == ids, text


@pytest.mark.parametrize(("rules", "expected"), [("as it is", None), ("single blanks", "repeated blanks")])
def test_what_the_class_leaves_out_of_a_model_is_reported(
    rules: str, expected: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence_piece(tmp_path / "theirs")
    path = model_file(tmp_path / "theirs" / "tokenizer.model", **RULES[rules])
    arguments = ["--input-dir", str(tmp_path / "theirs"), "--output-dir", str(tmp_path / "ours")]
    assert convert_from_hf.main(arguments) == 0
    reported = [line for line in capsys.readouterr().err.splitlines() if "LLaMA's class" in line]
    assert [f"does to {expected}:" in line for line in reported] == ([True] if expected else [])
    assert ["names LLaMA's class" in line for line in notes(make_tokenizer("SPMTokenizer", vocab_file=str(path)))] == (
        [False, True] if expected else [False]
    )


def test_a_unigram_model_under_llamas_class_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence_piece(tmp_path / "theirs", "unigram")
    arguments = ["--input-dir", str(tmp_path / "theirs"), "--output-dir", str(tmp_path / "ours")]
    assert convert_from_hf.main(arguments) == 0
    assert "transformers 5 reads this unigram .model by merges" in capsys.readouterr().err
