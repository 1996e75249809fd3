"""Bytes a token, and a loss in bits a byte."""

import math

import pytest

from megatron.data.count import bits_per_byte, count_texts, read_texts
from megatron.data.text_files import find_text_files
from megatron.tokenizers import make_tokenizer


def test_bytes_and_tokens():
    counted = count_texts(["ab", "", "é"], make_tokenizer("CharLevelTokenizer"))
    assert (counted.documents, counted.text_bytes, counted.tokens) == (2, 4, 6)
    assert counted.bytes_per_token == pytest.approx(4 / 6)
    assert count_texts(["ab"], make_tokenizer("CharLevelTokenizer"), append_eod=False).bytes_per_token == 1.0


def test_a_uniform_guess_over_bytes_is_eight_bits():
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)
    assert bits_per_byte(math.log(256), 4.0) == pytest.approx(2.0)


def test_texts_of_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one"}\nnot json\n{"body": "two"}\n')
    assert list(read_texts(find_text_files([str(path)]), "body")) == ["one", "two"]
