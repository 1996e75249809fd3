"""An exported folder reads and spells every text as the run did, whatever the class of the tokenizer it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from megatron.checkpoint.huggingface.tokenizer_files import copy_tokenizer
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.pretrained import PretrainedFromHF
from megatron.tokenizers.tokenizer_config import retain_reading
from tests.checkpoint.huggingface.tokenized import READ, llama_class, sentence_piece, write_model
from tools import convert_from_hf, convert_to_hf

CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("LlamaTokenizer", {}),
    ("LlamaTokenizerFast", {"legacy": True}),
    ("LlamaTokenizer", {"add_prefix_space": False}),
    ("LlamaTokenizerFast", {"add_bos_token": False, "legacy": False}),
    ("CodeLlamaTokenizer", {}),
    ("CodeLlamaTokenizerFast", {"legacy": True}),
]


def there_and_back(folder: Path) -> tuple[Path, Any]:
    """The exported folder of what is in `theirs`, and the run's tokenizer."""
    assert convert_from_hf.main(["--input-dir", str(folder / "theirs"), "--output-dir", str(folder / "ours")]) == 0
    keys = yaml.safe_load((folder / "ours" / "model.yml").read_text())
    assert convert_to_hf.main(["--input-dir", str(folder / "ours"), "--output-dir", str(folder / "back")]) == 0
    names = {"vocab_file": keys["vocab_file"], "merge_file": keys.get("merge_file")}
    return folder / "back", make_tokenizer(keys["tokenizer_type"], **names)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("kind", "flags"), CLASSES)
def test_llamas_class_reads_as_the_run_did(kind: str, flags: dict[str, Any], full: bool, tmp_path: Path) -> None:
    """The file's normalizer puts a blank before every text, and behind special tokens; the class does not."""
    llama_class(tmp_path / "theirs", kind, full=full, **flags)
    back, run = there_and_back(tmp_path)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "theirs", back))
    for text in READ:
        ids = run.encode_with_special_tokens(text)
        assert ids == before.encode(text, add_special_tokens=False), text
        assert ids == after.encode(text, add_special_tokens=False), text
        spelt = run.decode(ids)
        assert spelt == before.decode(ids, skip_special_tokens=True), text
        assert spelt == after.decode(ids, skip_special_tokens=True), text
        if full and "Code" not in kind:  # which puts <s> before a text that the file puts nothing before
            assert after.encode(text) == before.encode(text), text


@pytest.mark.parametrize("flags", [{}, {"legacy": True}, {"legacy": False}])
@pytest.mark.parametrize("model_type", ["mistral", "mixtral"])
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer"])
def test_mistrals_file_is_read_as_it_is_written(
    kind: str, model_type: str, flags: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever class is named: `transformers` knows that these models' folders name a wrong one."""
    llama_class(tmp_path / "theirs", kind, full=True, **flags)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    copy_tokenizer(tmp_path / "theirs", tmp_path / "copied")
    retain_reading(tmp_path / "theirs", tmp_path / "copied")
    (tmp_path / "copied" / "config.json").unlink(missing_ok=True)
    before = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    runs = [PretrainedFromHF(str(tmp_path / name)) for name in ("theirs", "copied")]
    runs.append(PretrainedFromHF(str(tmp_path / "theirs" / "tokenizer.json")))
    for text in READ:
        ids = before.encode(text, add_special_tokens=False)
        for run in runs:
            assert run.encode_with_special_tokens(text) == ids, text
            assert run.decode(ids) == before.decode(ids, skip_special_tokens=True), text


def test_a_mistral_goes_out_as_it_came(tmp_path: Path) -> None:
    llama_class(tmp_path / "theirs", full=True)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    back, run = there_and_back(tmp_path)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "theirs", back))
    assert (back / "tokenizer.json").read_bytes() == (tmp_path / "theirs" / "tokenizer.json").read_bytes()
    for text in READ:
        assert after.encode(text) == before.encode(text), text
        assert run.encode_with_special_tokens(text) == before.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer"])
def test_other_classes_keep_the_file_byte_by_byte(kind: str, tmp_path: Path) -> None:
    llama_class(tmp_path / "theirs", kind, full=True)
    back, _ = there_and_back(tmp_path)
    assert (back / "tokenizer.json").read_bytes() == (tmp_path / "theirs" / "tokenizer.json").read_bytes()


def test_a_file_that_says_what_the_class_reads_is_retained_byte_by_byte(tmp_path: Path) -> None:
    llama_class(tmp_path / "theirs", "LlamaTokenizer", full=True)
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    sentence_piece(tmp_path / "piece")
    AutoTokenizer.from_pretrained(tmp_path / "piece").save_pretrained(tmp_path / "saved")
    content = (tmp_path / "saved" / "tokenizer.json").read_bytes()
    (tmp_path / "theirs" / "tokenizer.json").write_bytes(content)
    back, _ = there_and_back(tmp_path)
    assert (back / "tokenizer.json").read_bytes() == content


@pytest.mark.parametrize("described", [True, False])
def test_tokens_that_a_model_file_cannot_hold_are_reported_and_retained(
    described: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence_piece(tmp_path / "theirs", "char")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    size = config["vocab_size"]
    write_model(tmp_path / "theirs", size + 2, bos_token_id=1, eos_token_id=2)
    added = {"<|im_start|>": size, "<|im_end|>": size + 1}
    reported: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer"}
    if described:
        entries = {str(number): {"content": token, "special": True} for token, number in added.items()}
        reported["added_tokens_decoder"] = entries
    else:
        (tmp_path / "theirs" / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(reported))
    back, run = there_and_back(tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert run.vocab_size == size
    lines = [line for line in said if "<|im_end|>, <|im_start|> are added beside a .model" in line]
    assert len(lines) == 2, "by each of the two programs"
    assert "transformers adds them" in lines[1]
    assert not (back / "tokenizer.json").exists()
    read = AutoTokenizer.from_pretrained(back)
    assert [read.convert_tokens_to_ids(token) for token in added] == [*added.values()]
