"""The fast engine gives the ids of `tokenizers`, on every character and on odd text; where it may not, it says so."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from megatron.tokenizers import byte_level
from megatron.tokenizers.byte_level import ByteLevelEngine, CannotEncodeAlike, make_engine, unequal_merge
from megatron.tokenizers.trainer import train_byte_level_bpe

CORPUS = ["for each line of the file, it's what they've said: 12345  \n\n\tnaïve café 東京 " * 20]


@pytest.fixture(scope="module")
def trained():
    tokenizer = train_byte_level_bpe(iter(CORPUS), 400)
    tokenizer.encode_special_tokens = True
    return tokenizer.to_str()


def loaded(description):
    tokenizer = Tokenizer.from_str(description if isinstance(description, str) else json.dumps(description))
    tokenizer.encode_special_tokens = True
    return tokenizer


def by_pattern(pattern):
    def change(tokenizer):
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])

    return change


def normalised(tokenizer):
    tokenizer.normalizer = normalizers.NFC()


def with_runs_of_spaces(tokenizer):
    tokenizer.add_tokens([AddedToken(" " * size, normalized=size % 2 == 0) for size in range(2, 9)])


TAKEN = {
    "gpt2": lambda tokenizer: None,
    "cl100k": by_pattern(byte_level.CL100K_WORDS),
    "qwen2": by_pattern(byte_level.QWEN2_WORDS),
    "o200k": by_pattern(byte_level.O200K_WORDS),
    "nfc": normalised,
    "spaces": with_runs_of_spaces,
}


@pytest.fixture(scope="module", params=TAKEN)
def both(request, trained):
    tokenizer = loaded(trained)
    TAKEN[request.param](tokenizer)
    return ByteLevelEngine(tokenizer), tokenizer


def alike(both, text):
    engine, tokenizer = both
    return engine.encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


EVERY_CHARACTER = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)


def test_every_character_with_the_commonest_pattern(trained):
    tokenizer = loaded(trained)
    assert alike((ByteLevelEngine(tokenizer), tokenizer), EVERY_CHARACTER)


@pytest.mark.long
def test_every_character(both):
    assert alike(both, EVERY_CHARACTER)


ODD = "aZ '\u017f\u212aſsS0\u0660\u00b2 \t\n\r\u0085\u00a0\u2003\u3000\u180e\u200b\u200de\u0301\u0345İß東🙂<|endofx>/!"


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=st.one_of(st.sampled_from(ODD), st.characters(codec="utf-8")), max_size=80))
def test_any_text(both, text):
    assert alike(both, text)


def test_long_texts_are_cut_where_a_word_begins(both, monkeypatch):
    text = "".join(f"word{number}  it's\n\n x{'!' * (number % 7)}\r\n" for number in range(400))
    full = both[0].encode(text).tolist()
    monkeypatch.setattr(byte_level, "LONG_TEXT", 50)
    parts = list(byte_level.cut(text))
    assert len(parts) > 50
    assert "".join(parts) == text
    assert both[0].encode(text).tolist() == full
    assert alike(both, text)


def test_a_run_of_spaces_that_the_engine_gives_up_on(trained):
    tokenizer = loaded(trained)
    assert alike((ByteLevelEngine(tokenizer), tokenizer), "a" + " " * 700_000 + "b c")


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        (lambda found: found["model"].update(dropout=0.1), "not plain BPE"),
        (lambda found: found["model"]["merges"].reverse(), "another way"),
        (lambda found: found["pre_tokenizer"].update(add_prefix_space=True), "space is put before"),
        (lambda found: found.update(normalizer={"type": "Lowercase"}), "normaliser Lowercase"),
        (lambda found: found.update(pre_tokenizer={"type": "Whitespace"}), "not a byte-level"),
    ],
)
def test_what_may_differ_is_not_taken(trained, change, reported):
    found = json.loads(trained)
    change(found)
    engine, why = make_engine(loaded(found))
    assert engine is None
    assert reported in why


def test_merges_that_come_about_in_another_way():
    """The merges ab, bc and abc = a + bc: ab is joined first, so a + bc never is there, but ab + c does."""
    assert unequal_merge([[(0, 1)], [(1, 2)], [(0, 4)]], 3) == 2
    assert unequal_merge([[(0, 1)], [(1, 2)], [(3, 2)]], 3) is None
    assert unequal_merge([[(0, 0)], [(3, 3)], [(3, 0)]], 3) is None
    assert unequal_merge([[(0, 4)]], 3) == 0


def test_all_pairs_of_a_token_may_be_listed():
    """What is left of abc is ab + c, wherever that is in the list of its pairs."""
    assert unequal_merge([[(0, 1)], [(1, 2)], [(0, 4), (3, 2)]], 3) is None
    assert unequal_merge([[(0, 1)], [(1, 2)], [(3, 2), (0, 4)]], 3) is None
    assert unequal_merge([[(0, 1)], [(1, 2)], [(0, 4), (0, 5)]], 3) == 2


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_proof_against_both_engines(data):
    """Random lists of merges over three letters: what passes the check encodes alike on every short word.

    With every pair of a token listed, as converters do, or one, or pairs of earlier tokens once more.
    """
    alphabet = byte_level.byte_alphabet()
    tokens = ["a", "b", "c"]
    merges = []
    every = data.draw(st.sampled_from(["one", "every", "repeated"]))
    for _ in range(data.draw(st.integers(1, 7))):
        pair = data.draw(st.tuples(st.sampled_from(tokens), st.sampled_from(tokens)))
        made = "".join(pair)
        if made in tokens:
            if every == "repeated" and len(made) > 1 and pair not in merges:
                merges.append(pair)
            continue
        if every == "every":
            splits = [(made[:position], made[position:]) for position in range(1, len(made))]
            merges += data.draw(st.permutations([split for split in splits if set(split) <= set(tokens)]))
        else:
            merges.append(pair)
        tokens.append(made)
    vocabulary = {token: number for number, token in enumerate([*alphabet, *tokens[3:]])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    try:
        ranks, ids = byte_level._ranks_of(json.loads(tokenizer.to_str()))
    except CannotEncodeAlike:
        return
    core = byte_level._core(byte_level.GPT2_WORDS, ranks)
    text = " ".join(data.draw(st.lists(st.text(alphabet="abc", max_size=12), max_size=20)))
    assert ids[core.encode_ordinary(text)].tolist() == tokenizer.encode(text, add_special_tokens=False).ids
