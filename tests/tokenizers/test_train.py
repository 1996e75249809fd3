"""Training a tokenizer: its special ids, its size, and the same result each time."""

import itertools
import re

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron.errors import ConfigError, RunError
from megatron.tokenizers import make_tokenizer, trainer
from megatron.tokenizers.masking import masking_tokens
from megatron.tokenizers.to_folder import portable
from megatron.tokenizers.trainer import save_tokenizer, train_byte_level_bpe, train_sentence_piece
from megatron.tokenizers.word_piece_trainer import save_word_pieces, train_word_pieces

TEXT = ["for each line in the file, print the line and count the words in each line"] * 5


def test_special_tokens_come_first(tmp_path):
    trained = train_byte_level_bpe(iter(TEXT), 300)
    assert trained.token_to_id("<|endoftext|>") == 0
    assert trained.token_to_id("<|padding|>") == 1
    save_tokenizer(trained, tmp_path / "made" / "tokenizer.json")
    loaded = make_tokenizer("HFTokenizer", vocab_file=str(tmp_path / "made" / "tokenizer.json"))
    assert loaded.eod == 0
    assert 258 < loaded.vocab_size <= 300
    assert loaded.encode(" line") == [trained.token_to_id("Ġline")]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["tokenizer.json"]


def test_the_same_text_gives_the_same_tokenizer():
    first, second = (train_byte_level_bpe(iter(TEXT), 300).to_str() for _ in range(2))
    assert first == second


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="258"):
        train_byte_level_bpe(iter(TEXT), 257)


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_too_few_pieces_for_the_characters_are_refused_with_the_least_number(tmp_path, algorithm):
    text = ["".join(map(chr, range(0x4E00, 0x4E00 + 200)))] * 3
    with pytest.raises(ConfigError, match=r"ask for more than (\d+)") as refused:
        train_sentence_piece(iter(text), 300, tmp_path / "few.model", algorithm=algorithm)
    assert "fewer" not in str(refused.value) and "coverage" not in str(refused.value)
    least = int(re.search(r"ask for more than (\d+)", str(refused.value))[1])
    assert least > 300
    assert train_sentence_piece(iter(text), least + 1, tmp_path / "made.model", algorithm=algorithm) <= least + 1


def test_more_pieces_than_the_text_supports_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="ask for fewer pieces, or give more text"):
        train_sentence_piece(iter(["ab ab"]), 5000, tmp_path / "many.model", algorithm="bpe")


LIMIT = 120
LONG = {
    "blanks": "zigzag quiz " * 40,
    "no blank": "zigzag_quiz_" * 40,
    "several bytes a character": "жизнь чудо " * 40,
    "no blank, several bytes": "жизньчудо" * 40,
    "NUL": "zigzag quiz\0 " * 5,
    "a mark of the library": "zigzag quiz \u2585 " * 5,
}


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
@pytest.mark.parametrize("line", LONG.values(), ids=LONG)
def test_all_of_a_line_is_learnt(tmp_path, monkeypatch, line, algorithm):
    """The library leaves out lines above a length, and lines with marks of its own, without a word."""
    monkeypatch.setattr(trainer, "_LONGEST_LINE", LIMIT)
    train_sentence_piece(iter(["the rest"] * 3 + [line]), 278, tmp_path / "made.model", algorithm=algorithm)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "made.model"))
    letters = set(line) - set(" \0\u2585")
    assert letters and all(model.piece_to_id(letter) != model.unk_id() for letter in letters)


@given(line=st.text(alphabet="ab жあ😀", max_size=400))
def test_the_parts_of_a_line_are_the_line(line):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_LONGEST_LINE", LIMIT)
        parts = list(trainer._parts(line))
    assert "".join(parts) == line
    sizes = [len(part.encode()) for part in parts]
    assert all(0 < size <= LIMIT for size in sizes) or not line
    for part, following in itertools.pairwise(parts):
        assert following.startswith(" ") or (" " not in part[1:] and len(part.encode()) > LIMIT - 4)


@pytest.mark.parametrize("lower", [True, False])
def test_word_pieces_of_a_text(tmp_path, lower):
    """Special tokens first, then every character at the start and inside of words; the same each time."""
    texts = ["Trains and training of rain, RAINY trainings!", "été 東京"] * 20
    made = [train_word_pieces(lambda: iter(texts), 90, lower=lower) for _ in range(3)]
    assert made[0] == made[1] == made[2]
    assert made[0][:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert ("rain" in made[0]) and ("R" in made[0]) != lower
    assert "##東" not in made[0] and "##," not in made[0]
    save_word_pieces(made[0], tmp_path / "vocab.txt")
    kind = "BertWordPieceLowerCase" if lower else "BertWordPieceCase"
    tokenizer = make_tokenizer(kind, vocab_file=str(tmp_path / "vocab.txt"))
    pieces = [tokenizer.pieces[number] for number in tokenizer.encode("Rain été 東京")]
    assert "".join(pieces).replace("##", "") == ("rainete東京" if lower else "Rainété東京")
    portable(kind, str(tmp_path / "vocab.txt"), None).write(tmp_path, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.cls_token, theirs.sep_token, theirs.mask_token, theirs.pad_token) == (
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[PAD]",
    )
    pair = theirs("Rain", "été")
    assert pair["input_ids"] == [2, *tokenizer.encode("Rain"), 3, *tokenizer.encode("été"), 3]
    assert pair["token_type_ids"] == [0] * (len(tokenizer.encode("Rain")) + 2) + [1] * (
        len(tokenizer.encode("été")) + 1
    )
    tokens = masking_tokens(tokenizer)
    assert (tokens.pad, tokens.cls, tokens.sep, tokens.mask) == (0, 2, 3, 4)
    assert [bool(each) for each in tokens.continues] == [piece.startswith("##") for piece in tokenizer.pieces]


def test_word_pieces_that_cannot_hold_the_characters_are_refused():
    with pytest.raises(ConfigError, match="ask for 15 or more"):
        train_word_pieces(lambda: iter(["abcde"]), 14, lower=True)
    with pytest.raises(RunError, match="no text"):
        train_word_pieces(lambda: iter([]), 100, lower=True)


def test_other_vocabularies_mark_the_pieces_inside_of_words(tmp_path):
    """Byte-level pieces without a blank in front continue a word, where they have letters."""
    trained = train_byte_level_bpe(iter(TEXT), 300)
    trained.add_special_tokens(["<s>", "</s>", "<mask>", "<pad>"])
    save_tokenizer(trained, tmp_path / "tokenizer.json")
    tokenizer = make_tokenizer("HFTokenizer", vocab_file=str(tmp_path / "tokenizer.json"))
    tokens = masking_tokens(tokenizer)
    assert tokens.mask == tokenizer.special_tokens["<mask>"]
    continues = {piece: bool(tokens.continues[number]) for number, piece in enumerate(tokenizer.pieces)}
    assert not continues["Ġline"] and not continues[","] and not continues["<s>"]
    assert continues["e"] and continues["h"]
    with pytest.raises(ConfigError, match=r"lacks \[CLS\] or <s>, \[SEP\] or </s>, \[MASK\] or <mask>"):
        masking_tokens(make_tokenizer("CharLevelTokenizer"))
