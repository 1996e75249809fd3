"""A line for each folder whose tokenizer transformers builds by a class that gives other ids than its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron.checkpoint.huggingface.forced_tokenizers import FORCED, other_ids
from megatron.tokenizer_info import QWEN2
from tests.tokenizers.made import byte_level_by

TEXTS = ["It's 2024, don't  12345\n\n  go", "na\u0131\u0308ve cafe\u0301s", "don't don't 12345 12345 2024 2024"]


def write(folder: Path, kind: str, *, pattern: str, nfc: bool = True) -> Tokenizer:
    """A folder of that model type with a byte-level tokenizer that was trained on the texts."""
    made = byte_level_by(pattern, TEXTS, nfc=nfc)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return made


@pytest.mark.parametrize(
    ("kind", "pattern", "nfc"),
    [
        *[(kind, pattern, True) for kind, (_, pattern) in FORCED.items()],
        ("qwen2", QWEN2, False),
        ("qwen2", QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?"), True),
        ("llama", r"\s+|\S+", False),
    ],
)
def test_a_line_says_where_ids_differ(kind: str, pattern: str, nfc: bool, tmp_path: Path) -> None:
    own = write(tmp_path / "folder", kind, pattern=pattern, nfc=nfc)
    theirs, plain = (each.from_pretrained(tmp_path / "folder") for each in (AutoTokenizer, PreTrainedTokenizerFast))
    ids = [own.encode(text).ids for text in TEXTS]
    assert [plain(text, add_special_tokens=False)["input_ids"] for text in TEXTS] == ids
    alike = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS] == ids
    line = other_ids(tmp_path / "folder")
    assert alike == (line is None)
    assert line is None or "PreTrainedTokenizerFast.from_pretrained" in line


def test_a_folder_without_a_tokenizer_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert other_ids(tmp_path) is None
