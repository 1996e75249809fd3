"""A model is not written beside files of another one, which every program would read with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron.checkpoint.huggingface.target_folder import refuse_adapter_files, refuse_model_files
from megatron.errors import RunError
from tests.checkpoint.huggingface.tokenized import FOLDERS, write_model
from tools import convert_from_hf, convert_to_hf

OF_TOKENIZERS = [
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "tokenizer.json"),
    *("tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("cl100k.tiktoken", "tekken.json"),
]
OF_MODELS = [
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("model-00001-of-00002.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"),
    *("params.json", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "quantize_config.json"),
]
OTHERS = ["README.md", "LICENSE", ".gitattributes", "notes.txt", "eval_results.json"]


@pytest.mark.parametrize("name", [*OF_TOKENIZERS, *OF_MODELS])
def test_a_file_of_an_earlier_model_is_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(RunError, match=name) as refused:
        refuse_model_files(tmp_path, tokenizer=True)
    assert "give an empty or new one" in str(refused.value)
    if name in OF_TOKENIZERS:  # the user's own choice, where none is written
        refuse_model_files(tmp_path, tokenizer=False)
        refuse_adapter_files(tmp_path)
        return
    for refuse in (lambda: refuse_model_files(tmp_path, tokenizer=False), lambda: refuse_adapter_files(tmp_path)):
        with pytest.raises(RunError, match=name):
            refuse()


def test_a_folder_of_further_templates_is_refused(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    with pytest.raises(RunError, match="additional_chat_templates"):
        refuse_model_files(tmp_path, tokenizer=True)


def test_other_files_and_new_folders_are_accepted(tmp_path: Path) -> None:
    for name in OTHERS:
        (tmp_path / name).write_text("x")
    for folder in (tmp_path, tmp_path / "new"):
        refuse_model_files(folder, tokenizer=True)
        refuse_adapter_files(folder)


def test_the_exported_tokenizer_is_the_runs_and_no_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An end in the earlier model's special_tokens_map.json would be obeyed."""
    FOLDERS["unnamed end"](tmp_path / "theirs")
    assert convert_from_hf.main(["--input-dir", str(tmp_path / "theirs"), "--output-dir", str(tmp_path / "ours")]) == 0
    back = tmp_path / "back"
    back.mkdir()
    (back / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|earlier|>"}))
    arguments = ["--input-dir", str(tmp_path / "ours"), "--output-dir", str(back)]
    assert convert_to_hf.main(arguments) == 1
    assert "special_tokens_map.json" in capsys.readouterr().err
    assert [path.name for path in back.iterdir()] == ["special_tokens_map.json"]
    (back / "special_tokens_map.json").unlink()
    assert convert_to_hf.main(arguments) == 0
    assert AutoTokenizer.from_pretrained(back).eos_token == "<stop>"


def test_an_import_is_not_mixed_with_the_tokenizer_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FOLDERS["chat markers"](tmp_path / "theirs")
    ours = tmp_path / "ours"
    (ours / "tokenizer").mkdir(parents=True)
    (ours / "tokenizer" / "added_tokens.json").write_text('{"<|earlier|>": 900}')
    arguments = ["--input-dir", str(tmp_path / "theirs"), "--output-dir", str(ours)]
    assert convert_from_hf.main(arguments) == 1
    assert "files of another tokenizer, which would be read with the new ones: added_tokens.json" in (
        capsys.readouterr().err
    )
    (ours / "tokenizer" / "added_tokens.json").unlink()
    assert convert_from_hf.main(arguments) == 0


def test_an_import_that_ends_early_leaves_no_tokenizer_behind(tmp_path: Path) -> None:
    FOLDERS["chat markers"](tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**config, "intermediate_size": 56}))
    arguments = ["--input-dir", str(tmp_path / "theirs"), "--output-dir", str(tmp_path / "ours")]
    assert convert_from_hf.main(arguments) != 0
    assert not (tmp_path / "ours" / "tokenizer").exists()
    write_model(tmp_path / "theirs", config["vocab_size"])
    assert convert_from_hf.main(arguments) == 0
