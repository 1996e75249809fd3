"""What a model reads of a prompt, and the text of what follows it, beside transformers."""

import pytest
from transformers import AutoTokenizer

from megatron.inference.generation_request import Detokenizer
from megatron.inference.prompt_encoding import TextBehind, read_prompt, read_text
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.char_level import CharLevelTokenizer
from tests.tokenizers import made

KINDS = {
    "llama2": (made.llama2, "PretrainedFromHF", ""),
    "llama3": (made.llama3, "PretrainedFromHF", ""),
    "chatml": (made.chatml, "PretrainedFromHF", ""),
    "sentencepiece": (
        lambda folder: made.sentence_piece(folder, add_bos_token=True),
        "SPMTokenizer",
        "tokenizer.model",
    ),
}
FULL = "Hello world, this is  a test: é 東京 \U0001f642.\nnames and numbers"


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    build, kind, file = KINDS[request.param]
    folder = build(tmp_path_factory.mktemp("kind"))
    return make_tokenizer(kind, vocab_file=str(folder / file)), AutoTokenizer.from_pretrained(folder)


def test_a_prompt_is_read_with_what_the_tokenizer_puts_before_it(both):
    ours, theirs = both
    for text in ("Hello world", " x", "<s", "a</s>b<|im_end|>"):
        assert read_text(ours, text) == theirs(text).input_ids


def test_what_the_text_spells_is_not_put_before_it_again(both):
    ours, theirs = both
    text = theirs.bos_token + "Hello"
    assert read_text(ours, text) == theirs(text, add_special_tokens=False).input_ids


def test_an_empty_prompt_starts_a_document(both):
    ours, theirs = both
    assert read_prompt(ours, "") == [theirs.bos_token_id]
    assert read_prompt(CharLevelTokenizer(), "") == [0]


def test_text_behind_a_prompt_is_that_of_joinedwithout_the_prompts(both):
    ours, _ = both
    ids = read_prompt(ours, FULL * 8)
    assert ours.decode(ids) == FULL * 8
    ends = [position for position in range(1, len(ids)) if "\ufffd" not in ours.decode(ids[:position])]
    assert len(ends) > len(ids) // 2
    for position in ends:
        assert TextBehind(ours, ids[:position]).text(ids[position:]) == (FULL * 8)[len(ours.decode(ids[:position])) :]


def test_a_prompt_that_ends_within_a_character(both):
    ours, _ = both
    ids = ours.encode("a \U0001f642b")
    cut = next(position for position in range(1, len(ids)) if "\ufffd" in ours.decode(ids[:position]))
    assert TextBehind(ours, ids[:cut]).text(ids[cut:]) == "\U0001f642b"
    assert TextBehind(ours, ids[:cut]).text([]) == ""


def test_a_cut_character_behind_a_newline_has_the_text_that_it_has_behind_a_word(both):
    """A newline may be a token of a byte, and a decoder of bytes makes U+FFFD of all bytes in front of a cut one."""
    ours, theirs = both
    word, joined = (theirs(text, add_special_tokens=False).input_ids for text in ("a", "a\U0001f642"))
    smile = joined[len(word) :]
    assert len(smile) > 1
    byte = theirs.get_vocab().get("<0x0A>")
    newline = ours.encode("\n") if byte is None else [byte]
    lines = [[*read_prompt(ours, "Hello"), *newline * count] for count in (1, 2)]
    for count in range(1, len(smile)):
        plain = TextBehind(ours, read_prompt(ours, "Hello")).text(smile[:count])
        assert set(plain) == {"\ufffd"}
        for prompt in lines:
            assert TextBehind(ours, prompt).text(smile[:count]) == plain
    assert [TextBehind(ours, prompt).text(smile) for prompt in lines] == ["\U0001f642"] * 2


def test_streamed_parts_keep_the_blank_before_the_first_word(both):
    ours, _ = both
    ids, before = read_prompt(ours, FULL), len(ours.prefix_ids) + 2
    rest = FULL.removeprefix(ours.decode(ids[:before]))
    assert 0 < len(rest) < len(FULL)
    parts = []
    made_of = Detokenizer(ours, (), parts.append, ids[:before])
    for position in range(before + 1, len(ids) + 1):
        made_of.add(ids[before:position])
    assert made_of.close(ids[before:]) == rest
    assert "".join(parts) == rest
    assert len(parts) > 3


@pytest.mark.parametrize("stops", [(), ("nowhere", "\n\nnowhere")])
@pytest.mark.parametrize("behind", [True, False])
def test_a_long_answer_costs_no_more_a_token_and_is_the_same_text(both, behind, stops, monkeypatch):
    """Whatever ends the text so far: whole words, blanks, parts of characters, a character that is not decodable."""
    ours, _ = both
    ids = read_prompt(ours, (FULL + " \ufffd" + "東京都" * 40) * 4)
    prompt, rest = (ids[:9], ids[9:]) if behind else ([], ids)
    expected, decoded, plain = TextBehind(ours, prompt).text(rest), [], type(ours).decode

    def decode(self, tokens):
        decoded.append(len(tokens))
        return plain(self, tokens)

    monkeypatch.setattr(type(ours), "decode", decode)
    parts = []
    made_of = Detokenizer(ours, stops, parts.append, prompt)
    for position in range(1, len(rest) + 1):
        made_of.add(rest[:position])
    assert len(rest) > 600 and max(decoded) < 400
    assert made_of.close(rest) == "".join(parts) == expected


def test_a_stop_text_far_into_an_answer(both):
    ours, _ = both
    ids = ours.encode(FULL * 8 + " the end, and more")
    parts = []
    made_of = Detokenizer(ours, ("the end,",), parts.append, ids[:5])
    position = next(position for position in range(6, len(ids) + 1) if made_of.add(ids[5:position]))
    assert position > 200
    text = (FULL * 8 + " ")[len(ours.decode(ids[:5])) :]
    assert "".join(parts) == made_of.close(ids[5:position]) == text


def test_a_stop_text_with_a_special_token_in_it(both):
    ours, theirs = both
    end = theirs.eos_token
    prompt = read_prompt(ours, "Hello")
    for stop, text, expected in (
        (f"{end}\n", f"one two{end}\nthree", "one two"),
        (f"two{end}", f"one two{end}three", "one "),
        (f"{end}\n", f"one{end}two\nthree", None),
    ):
        tokens = ours.encode_with_special_tokens("Hello" + text)[len(prompt) - len(ours.prefix_ids) :]
        parts = Detokenizer(ours, (stop,), None, prompt)
        stopped = [position for position in range(1, len(tokens) + 1) if parts.add(tokens[:position])][:1]
        assert bool(stopped) == (expected is not None)
        if stopped:
            parts = Detokenizer(ours, (stop,), None, prompt)
            assert parts.add(tokens[: stopped[0]])
            assert parts.close(tokens[: stopped[0]]) == expected
