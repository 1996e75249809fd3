"""The token loop: the cache changes nothing but the time, and greedy text is transformers' greedy text."""

import pytest
import torch

from megatron.inference import token_loop as decode_module
from megatron.inference.sampling import Sampler, Sampling
from megatron.inference.token_loop import Limits, RunningSequence, TokenLoop, decode
from megatron.registry import POSITIONS
from tests.inference.small_model import SEQUENCE, SmallEngine, small_config, transformers_twin

GREEDY = Sampling()
NEVER = -1  # no token has this id, so no text ends early
PROMPTS = ([7, 300, 41], [0], list(range(60, 85)), [7, 300, 41], [500] * 9)


@pytest.fixture(scope="module")
def engine():
    return SmallEngine(small_config())


def growing(prompt, *, sampling=GREEDY, eod=NEVER, maximum=1000, index=0, vocabulary=512):
    sampler = Sampler(sampling, vocab_size=vocabulary, seed=3, text_index=index)
    return RunningSequence(prompt, Limits(frozenset({eod}), maximum, SEQUENCE), sampler)


def texts(engine, prompts, *, rows=1, cached=True, **how):
    """The new tokens of each prompt."""
    started = [growing(prompt, index=index, **how) for index, prompt in enumerate(prompts)]
    made = {id(each): [] for each in started}
    for step in decode(engine, started, rows=rows, cached=cached):
        made[id(step.text)].append(step.token)
    return [made[id(each)] for each in started]


def text(engine, prompt, **how):
    (made,) = texts(engine, [prompt], **how)
    return made


SCHEMES = {
    **{
        name: {"pos_emb": name, "rotary_pct": 0.5 if name == "rotary" else 1.0}
        for name in POSITIONS.names
        if name != "relative"  # of two stacks
    },
    "window": {"sliding_window_width": 8},
}
WIDTHS = {"torch": {}, "compiled": {"hidden_size": 64}}
"""Heads of 8 features attend through torch, heads of 16 through the compiled loop."""


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_scheme_side_by_side_without_a_cache_and_with_one(scheme, width):
    engine = SmallEngine(small_config(**SCHEMES[scheme], **WIDTHS[width]))
    assert (engine.new_cache(1, 1).decode_kernel is None) == (width == "torch")
    plain = texts(engine, PROMPTS, rows=5, cached=False, maximum=20)
    assert texts(engine, PROMPTS, rows=3, maximum=20) == plain


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.3, top_k=50)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("width", WIDTHS)
def test_side_by_side_equals_one_by_one_cached_or_not(sampling, width):
    engine = SmallEngine(small_config(**WIDTHS[width]))
    alone = texts(engine, PROMPTS, sampling=sampling)
    assert [len(made) for made in alone] == [SEQUENCE - len(prompt) for prompt in PROMPTS]
    assert texts(engine, PROMPTS, sampling=sampling, cached=False) == alone
    for rows in (2, 5):
        assert texts(engine, PROMPTS, rows=rows, sampling=sampling) == alone
    assert texts(engine, PROMPTS, rows=3, sampling=sampling, cached=False) == alone


@pytest.mark.parametrize("width", WIDTHS)
def test_grouped_queries_side_by_side(width):
    engine = SmallEngine(small_config(num_kv_heads=2, **WIDTHS[width]))
    assert texts(engine, PROMPTS, rows=4) == texts(engine, PROMPTS) == texts(engine, PROMPTS, cached=False)


def test_long_prompts_join_in_groups(engine, monkeypatch):
    alone = texts(engine, PROMPTS)
    monkeypatch.setattr(decode_module, "PROMPT_TOKENS", 30)
    assert texts(engine, PROMPTS, rows=5) == alone


def test_a_text_that_joins_starts_at_once_and_changes_no_other(engine):
    alone = texts(engine, PROMPTS)
    loop = TokenLoop(engine, rows=3, max_length=SEQUENCE)
    started = [growing(prompt) for prompt in PROMPTS]
    loop.join(started[:1])
    for _ in range(4):
        loop.step()
    assert [step.text for step in loop.join(started[1:2])] == started[1:2]
    loop.step()
    loop.join(started[2:3])
    loop.leave(started[0])  # its reader hung up
    loop.step()
    assert loop.free == 1
    loop.join(started[3:4])
    while loop.step():
        pass
    for number in (1, 2, 3):
        assert started[number].tokens == [*PROMPTS[number], *alone[number]]
    assert loop.free == 3


def test_more_texts_than_rows_are_refused(engine):
    with pytest.raises(ValueError, match="do not fit"):
        TokenLoop(engine, rows=1, max_length=SEQUENCE).join([growing([1]), growing([2])])


def test_greedy_equals_transformers(engine):
    twin = transformers_twin(engine)
    made = texts(engine, PROMPTS, rows=4)
    for prompt, ours in zip(PROMPTS, made, strict=True):
        tokens = torch.tensor([prompt])
        theirs = twin.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_length=SEQUENCE,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert ours == theirs[0, len(prompt) :].tolist()


def test_the_text_ends_after_the_end_of_document_token(engine):
    full = text(engine, PROMPTS[0])
    end = full[10]
    assert text(engine, PROMPTS[0], eod=end) == full[: full.index(end) + 1]


def test_it_makes_no_more_than_asked_for_and_runs_the_model_once_a_token(engine):
    before = engine.calls
    assert [len(made) for made in texts(engine, [[1, 2], [3]], rows=2, maximum=5)] == [5, 5]
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
