"""Sampling against a direct numpy computation, and the properties that users rely on."""

import numpy
import pytest
import torch

from megatron.inference.sampling import NO_TOKEN, Sampler, Sampling, choose_all, distribution, shifted

LOGITS = numpy.random.default_rng(3).normal(scale=1.5, size=40)


def expected(logits, *, temperature=0.0, top_k=0, top_p=0.0, min_p=0.0):
    """The probabilities by the definitions, in float64, one token at a time."""
    scores = logits / temperature if temperature else logits.copy()
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    retained = set(order[:top_k] if top_k else order)
    weights = numpy.array([numpy.exp(scores[token]) if token in retained else 0.0 for token in range(len(scores))])
    probabilities = weights / weights.sum()
    if top_p:
        total, nucleus = 0.0, set()
        for token in order:
            if total > top_p:
                break
            nucleus.add(token)
            total += probabilities[token]
        probabilities = numpy.array([p if token in nucleus else 0.0 for token, p in enumerate(probabilities)])
        probabilities /= probabilities.sum()
    if min_p:
        probabilities[probabilities < min_p * probabilities.max()] = 0.0
        probabilities /= probabilities.sum()
    return probabilities


CASES = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 5},
    {"top_p": 0.7},
    {"temperature": 1.7, "top_k": 12, "top_p": 0.8},
    {"min_p": 0.03},
    {"top_k": 1},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_distribution_is_the_defined_one(case):
    found = distribution(torch.tensor(LOGITS, dtype=torch.float32), Sampling(**case)).numpy()
    assert found == pytest.approx(expected(LOGITS, **case), abs=1e-6)


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.97])
@pytest.mark.parametrize("ties", [False, True])
def test_the_nucleus_of_a_large_vocabulary_is_the_defined_one(spread, top_p, ties):
    """Whether few tokens hold it or thousands, and where equally likely ones are at its border."""
    logits = numpy.random.default_rng(8).normal(scale=spread, size=6000).astype(numpy.float32).astype(float)
    if ties:
        logits = numpy.round(logits / spread) * spread
    found = distribution(torch.tensor(logits, dtype=torch.float32), Sampling(top_p=top_p)).numpy()
    target = expected(logits, top_p=top_p)
    differing = (found > 0) != (target > 0)  # a sum in fp32 may put the border one token further
    assert differing.sum() <= 1
    assert found == pytest.approx(target, abs=2e-3 if differing.any() else 1e-5)


@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_draws_follow_the_distribution(case):
    """Chi-square over 4,000 draws; the bound is the 99.9th percentile, and the seed is fixed."""
    draws = 4000
    sampler = Sampler(Sampling(**case), vocab_size=len(LOGITS), seed=17)
    logits = torch.tensor(LOGITS, dtype=torch.float32)
    counts = numpy.bincount([sampler.choose(logits) for _ in range(draws)], minlength=len(LOGITS))
    target = expected(LOGITS, **case) * draws
    assert (counts[target == 0] == 0).all()
    large, rare = target >= 5, (target > 0) & (target < 5)
    observed = [*counts[large], counts[rare].sum()]
    hoped = [*target[large], target[rare].sum()]
    statistic = sum((o - h) ** 2 / h for o, h in zip(observed, hoped, strict=True) if h > 0)
    freedom = sum(h > 0 for h in hoped) - 1
    # Wilson and Hilferty's approximation of the chi-square percentile.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < bound


def test_greedy_only_when_everything_is_zero():
    assert Sampling().greedy
    for case in CASES:
        assert not Sampling(**case).greedy
    logits = torch.tensor(LOGITS, dtype=torch.float32)
    assert Sampler(Sampling(), vocab_size=40, seed=0).choose(logits) == LOGITS.argmax()


def test_a_seed_repeats_and_texts_have_streams_of_their_own():
    logits = torch.tensor(LOGITS, dtype=torch.float32)

    def drawn(seed, index):
        sampler = Sampler(Sampling(temperature=1.5), vocab_size=40, seed=seed, text_index=index)
        return [sampler.choose(logits) for _ in range(20)]

    assert drawn(1, 0) == drawn(1, 0)
    assert len({tuple(drawn(seed, index)) for seed in (1, 2) for index in (0, 1, 2)}) == 6


def test_a_tiny_nucleus_keeps_the_likeliest_token():
    assert distribution(torch.tensor([1.0, 3.0, 2.0]), Sampling(top_p=1e-9)).tolist() == [0.0, 1.0, 0.0]


def test_an_impossible_token_is_not_drawn_even_at_the_ends():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    sampler = Sampler(Sampling(temperature=1.0), vocab_size=5, seed=1)
    assert {sampler.choose(logits) for _ in range(300)} == {1, 3}


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_scores():
    logits = torch.tensor([2.0, 1.9, -1.0, -1.5])
    sampler = Sampler(Sampling(repetition_penalty=2.0), vocab_size=4, seed=0)
    assert sampler.choose(logits, seen=[0, 0]) == 1
    assert sampler.choose(torch.tensor([-1.0, -1.5]), seen=[0]) == 1
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0, -1.5])


@pytest.mark.parametrize("temperature", [1e-5, 1e-7, 1e-37, 1e-45, 5e-324])
@pytest.mark.parametrize("others", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_tiny_temperature_takes_the_likeliest(temperature, others):
    logits = torch.tensor(LOGITS * 100, dtype=torch.float32)
    sampler = Sampler(Sampling(temperature=temperature, **others), vocab_size=40, seed=1)
    assert {sampler.choose(logits) for _ in range(20)} == {int(logits.argmax())}
    assert choose_all([sampler] * 2, torch.stack([logits, -logits]), [[], []]) == [
        int(logits.argmax()),
        int(logits.argmin()),
    ]


@pytest.mark.parametrize("penalty", [1e-30, 1e-37, 1e-45, 1e-300, 1e30])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_of_any_size_leaves_a_token(penalty, temperature):
    logits = torch.tensor(LOGITS, dtype=torch.float32)
    sampler = Sampler(Sampling(temperature=temperature, repetition_penalty=penalty), vocab_size=40, seed=1)
    seen = [int(logits.argmax()), int(logits.argmin())]
    assert 0 <= sampler.choose(logits, seen) < 40


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(repetition_penalty=1.2),
        Sampling(temperature=1.0),
        Sampling(top_k=3),
        Sampling(temperature=0.7, top_p=0.9),
        Sampling(min_p=0.1),
    ],
    ids=str,
)
def test_scores_that_are_no_numbers_give_no_token(bad, sampling):
    logits = torch.tensor(LOGITS, dtype=torch.float32)
    broken = logits.clone()
    broken[7] = bad
    sampler = Sampler(sampling, vocab_size=40, seed=1)
    assert sampler.choose(broken, [3]) == NO_TOKEN
    first, second = choose_all([sampler, sampler], torch.stack([broken, logits]), [[3], [3]])
    assert first == NO_TOKEN and 0 <= second < 40
    padded = torch.cat([logits, torch.full((3,), bad)])  # what only pads the vocabulary does not matter
    assert 0 <= sampler.choose(padded, [3]) < 40
    assert sampler.choose(torch.full((40,), -float("inf")), [3]) == NO_TOKEN


def test_openais_penalties_and_biases_are_added_to_the_scores_of_the_new_text():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence + bias[j], where c counts in the new text only."""
    logits = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0])
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25, bias=((2, 4.0), (4, -1.0), (99, 5.0)))
    found = shifted(logits, [1, 1, 4], sampling)
    assert found.tolist() == [1.0, 2.0 - 2 * 0.5 - 0.25, -1.0 + 4.0, 0.5, 3.0 - 0.5 - 0.25 - 1.0]
    assert logits.tolist() == [1.0, 2.0, -1.0, 0.5, 3.0]
    sampler = Sampler(Sampling(presence_penalty=2.0), vocab_size=5, seed=0, prompt_tokens=2)
    assert sampler.choose(logits, [4, 4]) == 4  # the prompt does not count
    assert sampler.choose(logits, [4, 4, 4]) == 1
    both = [sampler, Sampler(Sampling(), vocab_size=5, seed=0)]
    assert choose_all(both, torch.stack([logits] * 2), [[4, 4, 4], [4, 4, 4]]) == [1, 4]
