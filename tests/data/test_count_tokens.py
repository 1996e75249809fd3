"""A loss in bits a byte, and the texts of files."""

import math

import pytest

from megatron.data.preprocess.count_tokens import bits_per_byte, read_texts
from megatron.data.preprocess.text_files import find_text_files


def test_a_uniform_guess_over_bytes_is_eight_bits():
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)
    assert bits_per_byte(math.log(256), 4.0) == pytest.approx(2.0)


def test_texts_of_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one"}\nnot json\n{"body": "two"}\n')
    assert list(read_texts(find_text_files([str(path)]), "body")) == ["one", "two"]
