"""The promises of megatron/tokenizers/base.py, kept by every registered tokenizer.

A new kind needs a builder in `BUILDERS`; a registered kind without one fails here.
"""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.registry import TOKENIZERS
from megatron.tokenizers import Tokenizer, build_tokenizer, make_tokenizer
from megatron.tokenizers.train import save_tokenizer, train_byte_level_bpe

TEXTS = [
    "",
    " ",
    "\n\n\t  \r\n",
    "Hello, world!",
    "def f(x):\n    return x  # tabs\tand  runs   of    spaces\n",
    "naïve café Ünï 東京 🙂👩‍💻 e\u0301 \ufb01",
    "text that spells <|endoftext|> and <|padding|> and <pad> </s>",
    "a NUL \x00 inside",
    "\ufeffbyte order mark",
    "x" * 5000,
]


def _hugging_face(folder):
    path = folder / "tokenizer.json"
    corpus = [text * 3 for text in TEXTS] + ["the quick brown fox jumps over the lazy dog " * 20]
    save_tokenizer(train_byte_level_bpe(iter(corpus), 512), path)
    return {"vocab_file": str(path)}


BUILDERS = {"HFTokenizer": _hugging_face, "CharLevelTokenizer": lambda folder: {}}


@pytest.fixture(scope="module", params=TOKENIZERS.names)
def tokenizer(request, tmp_path_factory):
    return make_tokenizer(request.param, **BUILDERS[request.param](tmp_path_factory.mktemp("tokenizer")))


def test_has_the_protocol(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert 0 <= tokenizer.eod < tokenizer.vocab_size


@pytest.mark.parametrize("text", TEXTS)
def test_gives_every_text_back(tokenizer, text):
    assert tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_gives_any_text_back_and_stays_in_range(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.eod not in ids


@pytest.mark.parametrize("text", TEXTS)
def test_no_text_forges_the_end_of_a_document(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.eod not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_encode_adds_nothing(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.encode("one two") == tokenizer.encode("one") + tokenizer.encode(" two")


def test_a_batch_equals_its_texts(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_pickling_keeps_every_promise(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.vocab_size, copy.eod, copy.lossless) == (tokenizer.vocab_size, tokenizer.eod, tokenizer.lossless)
    assert copy.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_special_and_unknown_ids_leave_no_text(tokenizer):
    ids = [*tokenizer.encode("one"), tokenizer.eod, *tokenizer.encode(" two"), tokenizer.vocab_size + 7]
    assert tokenizer.decode(ids) == "one two"


def test_half_a_character_decodes(tokenizer):
    # The tests' tokenizers know no token for this character, so it is several bytes.
    ids = tokenizer.encode("\U0001f9ff")
    assert len(ids) > 1
    assert set(tokenizer.decode(ids[:-1])) <= {"\ufffd"}


def test_is_built_from_a_section(tmp_path):
    class Section:
        tokenizer_type = "CharLevelTokenizer"
        vocab_file = None
        merge_file = None

    assert build_tokenizer(Section()).encode("ab") == [97, 98]
