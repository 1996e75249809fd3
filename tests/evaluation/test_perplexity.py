"""Perplexity a word and cloze accuracy, against sums in float64 over one window at a time."""

import math

import pytest
import torch

from megatron.errors import ConfigError
from megatron.evaluation.perplexity import Perplexity, cloze_accuracy, cloze_pairs, detokenised, word_perplexity
from megatron.inference.scoring import Pair, Score, score
from megatron.tokenizers.char_level import CharLevelTokenizer
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config

RAW = (
    " = Robert <unk> = \n \n Robert <unk> is an English film , television and theatre actor . He had 1 @,@ 000 roles . "
)


@pytest.fixture(scope="module")
def scorer():
    engine = SmallEngine(small_config())
    return lambda pairs: score(engine, pairs, max_length=SEQUENCE, batch_size=4)


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("a well @-@ known actor , he said .", "a well-known actor, he said ."),
        ("1 @,@ 000 and 1 @.@ 5 ( a b ) !", "1,000 and 1.5 (a b) !"),
        ('he said " no way " ; then', 'he said "no way"; then'),
        (" = = Career = = \n next", " == Career ==\nnext"),
        ("the boy 's toys", "the boy's toys"),
    ],
)
def test_spaced_out_punctuation_goes(raw, plain):
    assert detokenised(raw) == plain


@pytest.mark.parametrize("overlap", [1, 16, 200])
def test_every_token_but_the_first_counts_once_in_its_window(scorer, overlap):
    engine, tokenizer = SmallEngine(small_config()), CharLevelTokenizer()
    tokens = tokenizer.encode(detokenised(RAW))
    stride = min(overlap, SEQUENCE)
    nats, at = 0.0, 1
    while at < len(tokens):
        end = min(len(tokens), (SEQUENCE if at == 1 else at - 1 + stride) + 1)
        window = tokens[max(0, end - 1 - SEQUENCE) : end]
        rows = engine.logits(torch.tensor([window[:-1]]))[0].double().log_softmax(-1)
        for position in range(len(window) - (end - at), len(window)):
            nats -= float(rows[position - 1, window[position]])
        at = end
    found = word_perplexity(RAW, tokenizer, scorer, max_length=SEQUENCE, overlap=overlap)
    assert found.tokens == len(tokens) - 1 and found.words == len(RAW.strip().split(" ")) - 1
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.a_word == pytest.approx(math.exp(nats / found.words), rel=1e-4)


def test_a_perplexity_that_no_number_holds_is_infinite():
    found = Perplexity(nats=3000.0, tokens=3, words=1)
    assert found.a_token == math.inf and found.a_word == math.inf
    assert Perplexity(nats=600.0, tokens=2, words=1).a_word == math.exp(600)


def test_the_last_word_must_be_full():
    tokenizer = CharLevelTokenizer()
    pairs = cloze_pairs(["the cat sat on the mat ", "a b", "mat and\nmat"], tokenizer)
    assert [tokenizer.decode(pair.continuation) for pair in pairs] == [" mat", " b", " mat"]
    assert tokenizer.decode(pairs[2].context) == "mat and"
    assert tokenizer.decode(pairs[0].context) == "the cat sat on the"

    def knows(asked: list[Pair]) -> list[Score]:
        return [Score(-1.0, pair.continuation == tuple(b" mat")) for pair in asked]

    assert cloze_accuracy(["the cat sat on the mat", "a b"], tokenizer, knows) == 0.5


def test_texts_without_two_words_are_the_users_issue(scorer):
    with pytest.raises(ConfigError, match="eval_cloze"):
        cloze_pairs(["word"], CharLevelTokenizer())
    with pytest.raises(ConfigError, match="two words"):
        word_perplexity("word", CharLevelTokenizer(), scorer, max_length=SEQUENCE, overlap=4)
