"""A line for each folder whose tokenizer transformers builds by a class that gives other ids than its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron.checkpoint.huggingface.forced_tokenizers import FORCED, other_ids
from megatron.tokenizer_info import QWEN2

TEXTS = ["It's 2024, don't  12345\n\n  go", "na\u0131\u0308ve cafe\u0301s", "don't don't 12345 12345 2024 2024"]


def write(folder: Path, kind: str, *, pattern: str, nfc: bool = True) -> Tokenizer:
    """A folder of that model type with a byte-level tokenizer that was trained on the texts."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC() if nfc else None
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS * 4, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
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
