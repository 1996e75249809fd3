"""Scores of given text against a float64 computation, one pair at a time, without padding."""

import numpy
import pytest
import torch

from megatron.inference.scoring import Pair, score, windows
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config


@pytest.fixture(scope="module")
def engine():
    return SmallEngine(small_config())


def reference(engine, context, continuation):
    """Sum of log-softmax in float64, and whether each token is the likeliest."""
    text = [*context, *continuation]
    logits = engine.logits(torch.tensor([text[:-1]]))[0].detach().double().numpy()
    total, greedy = 0.0, True
    for at in range(len(context), len(text)):
        row = logits[at - 1]
        total += row[text[at]] - (row.max() + numpy.log(numpy.exp(row - row.max()).sum()))
        greedy = greedy and int(row.argmax()) == text[at]
    return total, greedy


def random_pairs(count):
    random = numpy.random.default_rng(1)
    return [
        Pair(
            tuple(random.integers(0, 512, random.integers(1, 20))),
            tuple(random.integers(0, 512, random.integers(1, 20))),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_do_not_depend_on_the_batch(engine, batch_size):
    pairs = random_pairs(11)
    found = score(engine, pairs, max_length=SEQUENCE, batch_size=batch_size)
    for one, pair in zip(found, pairs, strict=True):
        expected, _ = reference(engine, pair.context, pair.continuation)
        assert one.log_likelihood == pytest.approx(expected, abs=1e-4)


def test_greedy_says_whether_every_token_was_the_likeliest(engine):
    text = [5, 9]
    for _ in range(6):
        text.append(int(engine.logits(torch.tensor([text]))[0, -1].argmax()))
    likely = Pair((5, 9), tuple(text[2:]))
    unlikely = Pair((5, 9), (*text[2:-1], (text[-1] + 1) % 512))
    found = score(engine, [likely, unlikely], max_length=SEQUENCE, batch_size=2)
    assert [one.greedy for one in found] == [True, False]


def test_a_context_that_does_not_fit_is_cut_on_its_left(engine):
    context, continuation = tuple(range(100, 160)), (3, 4, 5)
    found = score(engine, [Pair(context, continuation)], max_length=SEQUENCE, batch_size=1)[0]
    retained = context[-(SEQUENCE + 1 - len(continuation)) :]
    assert found.log_likelihood == pytest.approx(reference(engine, retained, continuation)[0], abs=1e-4)


def test_a_continuation_that_does_not_fit_is_scored_full(engine):
    text = tuple(int(token) for token in numpy.random.default_rng(2).integers(0, 512, 2 * SEQUENCE + 7))
    found = score(engine, [Pair((0,), text)], max_length=SEQUENCE, batch_size=2)[0]
    expected = sum(reference(engine, pair.context, pair.continuation)[0] for pair in windows([0], text, SEQUENCE))
    assert found.log_likelihood == pytest.approx(expected, abs=1e-3)


def test_nothing_to_score_is_certain(engine):
    found = score(engine, [Pair((1,), ())], max_length=SEQUENCE, batch_size=2)[0]
    assert found.log_likelihood == 0.0 and found.greedy


@pytest.mark.parametrize("length", [1, 3, 4, 5, 9, 10, 40])
@pytest.mark.parametrize("stride", [None, 1, 3])
@pytest.mark.parametrize("context", [[-1], [-3, -2, -1], list(range(-9, 0))])
def test_windows_score_every_token_once_with_as_much_context_as_fits(length, stride, context):
    tokens = list(range(length))
    full = context + tokens
    found = list(windows(context, tokens, 4, stride))
    assert [token for pair in found for token in pair.continuation] == tokens
    for pair in found:
        assert len(pair.context) >= 1
        assert len(pair.inputs()) <= 4
        end = full.index(pair.continuation[-1]) + 1
        assert list(pair.context + pair.continuation) == full[max(0, end - 5) : end]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_windows_are_those_of_the_evaluation_harness(length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokens = list(range(100, 100 + length))
    theirs = map(
        make_disjoint_window,
        get_rolling_token_windows(token_list=tokens, prefix_token=0, max_seq_len=8, context_len=1),
    )
    assert [(list(p.context), list(p.continuation)) for p in windows([0], tokens, 8)] == [
        (list(context), list(continuation)) for context, continuation in theirs
    ]
