"""The token loop: the cache changes nothing but the time, and greedy text is transformers' greedy text."""

import pytest
import torch

from megatron.inference.decode import Limits, decode
from megatron.inference.sampling import Sampler, Sampling
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config, transformers_twin

GREEDY = Sampling()
NEVER = -1  # no token has this id, so no text ends early
PROMPTS = ([7, 300, 41], [0], list(range(60, 85)), [7, 300, 41], [500] * 9)


@pytest.fixture(scope="module")
def engine():
    return SmallEngine(small_config())


def text(engine, prompt, *, cache=None, sampling=GREEDY, eod=NEVER, maximum=1000, index=0, vocabulary=512):
    limits = Limits(eod, maximum, SEQUENCE)
    sampler = Sampler(sampling, vocab_size=vocabulary, seed=3, text_index=index)
    return [step.token for step in decode(engine, prompt, limits=limits, sampler=sampler, cache=cache)]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.3, top_k=50)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("scheme", ["rotary", "learned", "none"])
def test_cached_equals_uncached_over_several_prompts(sampling, scheme):
    engine = SmallEngine(small_config(pos_emb=scheme, **({} if scheme == "rotary" else {"rotary_pct": 1.0})))
    cache = engine.new_cache(1, SEQUENCE)
    for index, prompt in enumerate(PROMPTS):
        cached = text(engine, prompt, cache=cache, sampling=sampling, index=index)
        assert len(cached) == SEQUENCE - len(prompt)
        assert cached == text(engine, prompt, sampling=sampling, index=index)


def test_a_cache_left_full_by_one_prompt_does_not_reach_the_next(engine):
    cache = engine.new_cache(1, SEQUENCE)
    first = text(engine, PROMPTS[0], cache=cache)
    text(engine, PROMPTS[2], cache=cache, maximum=3)
    assert text(engine, PROMPTS[0], cache=cache) == first


def test_greedy_equals_transformers(engine):
    twin = transformers_twin(engine)
    cache = engine.new_cache(1, SEQUENCE)
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        theirs = twin.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_length=SEQUENCE,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert text(engine, prompt, cache=cache) == theirs[0, len(prompt) :].tolist()


def test_the_text_ends_after_the_end_of_document_token(engine):
    whole = text(engine, PROMPTS[0])
    end = whole[10]
    assert text(engine, PROMPTS[0], eod=end) == whole[: whole.index(end) + 1]


def test_it_makes_no_more_than_asked_for_and_runs_the_model_once_a_token(engine):
    cache = engine.new_cache(1, SEQUENCE)
    before = engine.calls
    assert len(text(engine, [1, 2], cache=cache, maximum=5)) == 5
    assert engine.calls - before == 5
    assert text(engine, [1, 2], maximum=0) == []
    assert text(engine, [1] * SEQUENCE) == []


def test_padding_of_the_vocabulary_is_never_chosen(engine):
    greedy = text(engine, PROMPTS[0])
    assert max(greedy) >= 300  # else the next line would show nothing
    assert max(text(engine, PROMPTS[0], vocabulary=300)) < 300
    assert max(text(engine, PROMPTS[0], vocabulary=300, sampling=Sampling(temperature=5.0))) < 300


def test_an_empty_prompt_is_refused(engine):
    with pytest.raises(ValueError, match="at least one token"):
        text(engine, [])
