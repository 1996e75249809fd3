"""Training a tokenizer: its special ids, its size, and the same result each time."""

import pytest

from megatron.errors import ConfigError
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.trainer import save_tokenizer, train_byte_level_bpe

TEXT = ["for each line in the file, print the line and count the words in each line"] * 5


def test_special_tokens_come_first(tmp_path):
    trained = train_byte_level_bpe(iter(TEXT), 300)
    assert trained.token_to_id("<|endoftext|>") == 0
    assert trained.token_to_id("<|padding|>") == 1
    save_tokenizer(trained, tmp_path / "made" / "tokenizer.json")
    loaded = make_tokenizer("HFTokenizer", vocab_file=str(tmp_path / "made" / "tokenizer.json"))
    assert loaded.eod == 0
    assert 258 < loaded.vocab_size <= 300
    assert loaded.encode(" line") == [trained.token_to_id("Ġline")]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["tokenizer.json"]


def test_the_same_text_gives_the_same_tokenizer():
    first, second = (train_byte_level_bpe(iter(TEXT), 300).to_str() for _ in range(2))
    assert first == second


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="258"):
        train_byte_level_bpe(iter(TEXT), 257)
