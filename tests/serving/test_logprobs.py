"""The forms of log-probabilities, and the texts and places of single tokens."""

import math

import pytest

from megatron.serving.logprobs import chat_logprobs, completion_logprobs
from megatron.serving.streaming import TokenScore
from megatron.serving.token_text import Words
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.char_level import CharLevelTokenizer
from tests.serving.service import Spelling
from tests.tokenizers import made


def test_the_likeliest_of_two_tokens_with_one_text_is_retained_and_numbers_are_finite():
    words = Words(Spelling())  # 97 and 123 have the same letter
    score = TokenScore(97, 0, -0.5, {123: -0.1, 97: -0.5, 98: -math.inf})
    found = completion_logprobs(words, [TokenScore(98, 0), score])
    assert found["top_logprobs"] == [None, {"t": -0.1, "u": -9999.0}]
    assert found["token_logprobs"] == [None, -0.5]
    (entry,) = chat_logprobs(words, [score], 2)["content"]
    assert [each["logprob"] for each in entry["top_logprobs"]] == [-0.1, -0.5] and entry["bytes"] == [ord("t")]


def test_parts_of_characters_are_reported_apart_by_their_bytes():
    words = Words(CharLevelTokenizer())
    assert [words.text(byte) for byte in "aé".encode()] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert words.bytes_of(0xC3) == [0xC3] and words.bytes_of(97) == [97]
    assert words.text(400) == "token_id:400" and words.bytes_of(400) == []


@pytest.mark.parametrize("kind", ["llama2", "llama3", "chatml", "sentence_piece", "gpt2"])
def test_texts_of_tokens_put_together_are_the_text(kind, tmp_path):
    folder = getattr(made, kind)(tmp_path / kind)
    spm = kind == "sentence_piece"
    tokenizer = make_tokenizer(
        "SPMTokenizer" if spm else "PretrainedFromHF", vocab_file=str(folder / "tokenizer.model" if spm else folder)
    )
    words = Words(tokenizer)
    text = "Hello  world, naïve 東京 🙂 " + "the rain fell " * 20
    for special in ("", *list(tokenizer.special_tokens)[:2]):
        ids = tokenizer.encode_with_special_tokens(special + text)
        spelt = b"".join(bytes(words.bytes_of(token)) for token in ids).decode()
        assert spelt.replace(" ", "") == (special + text).replace(" ", "")
        assert words.spelt(ids).replace(" ", "") == (special + text).replace(" ", "")
        positions = words.offsets_in(special + text, ids)
        assert positions == sorted(positions) and positions[0] == 0
        for token, position in zip(ids, positions, strict=True):
            reported = words.text(token)
            assert reported.startswith("bytes:") or (special + text)[position:].lstrip().startswith(reported.lstrip())
    texts = [words.text(token) for token in range(tokenizer.vocab_size)]
    twice = {each for each in texts if texts.count(each) > 1}
    assert all(len(each) == 1 for each in twice)  # a letter, and the byte that spells it
