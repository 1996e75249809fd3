"""What a tokenizer.json of a sentencepiece model reads otherwise is found, so that an export can say it."""

from __future__ import annotations

import io
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer

from megatron.tokenizers.sentence_piece import SPMTokenizer
from megatron.tokenizers.sentence_piece_json import as_tokenizer_json, text_read_otherwise
from tests.tokenizers import made

KANA = ["ガス料金の支払いはパソコンで。", "プログラムを書くテスト", "データベースの設計"]
CASES: dict[str, tuple[list[str], dict[str, Any], str | None]] = {
    "the default normalizer": (KANA, {}, "\uff8a\uff9f\uff7f\uff7a\uff9d"),
    "a symbol": (
        list(made.LINES),
        {"user_defined_symbols": ["<sep>"], "normalization_rule_name": "identity"},
        "a<sep>b <sep> c",
    ),
    "neither": (list(made.LINES), {"normalization_rule_name": "identity", "byte_fallback": True}, None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_text_that_is_read_otherwise_is_found(name: str, tmp_path: Path) -> None:
    lines, settings, expected = CASES[name]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20),
        model_writer=model,
        vocab_size=330 if settings else 60,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    path = tmp_path / "own.model"
    path.write_bytes(model.getvalue())
    tokenizer = SPMTokenizer(str(path))
    content = as_tokenizer_json(tokenizer, path)
    assert content is not None
    found = text_read_otherwise(content, tokenizer, path)
    assert found == (None if expected is None else unicodedata.normalize("NFD", expected))
    if found is not None:
        assert Tokenizer.from_str(content).encode(found, add_special_tokens=False).ids != tokenizer.encode(found)
