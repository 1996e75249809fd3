"""Texts that spell special tokens that the model of a tokenizer finds: data gets other ids, prompts get these.

The reference for every other text is the `tokenizers` library itself, for named tokens `transformers`.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.from_folder import find_tokenizer
from megatron.tokenizers.spelt_tokens import special_ids, without_special_tokens
from megatron.tokenizers.to_folder import portable_of
from megatron.tokenizers.trainer import train_sentence_piece

LINES = ["the quick brown fox jumps over the lazy dog", "a page about tags </ > < s |> end of text 0x0A"] * 30
SPECIAL = ["<unk>", "<s>", "</s>"]
SPELT = ["</s>", "a </s> b <s> c", "x</s>y<s></s>", " </s> ", "the <s>fox</s> jumps"]
SPACES, WORDS = pre_tokenizers.WhitespaceSplit(), {"vocab_size": 200, "special_tokens": SPECIAL}
PARTED = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
)
BYTES = {**WORDS, "vocab_size": 320, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
KINDS: dict[str, tuple[Any, Any, Any]] = {
    "unigram": (
        models.Unigram(),
        pre_tokenizers.Metaspace(),
        trainers.UnigramTrainer(**WORDS, unk_token="<unk>", show_progress=False),
    ),
    "words": (models.WordLevel(unk_token="<unk>"), SPACES, trainers.WordLevelTrainer(**WORDS, show_progress=False)),
    "word pieces": (models.WordPiece(unk_token="<unk>"), SPACES, trainers.WordPieceTrainer(**WORDS)),
    "whole words": (
        models.BPE(unk_token="<unk>", ignore_merges=True),
        SPACES,
        trainers.BpeTrainer(**WORDS, show_progress=False),
    ),
    "whole words of bytes": (models.BPE(ignore_merges=True), PARTED, trainers.BpeTrainer(**BYTES, show_progress=False)),
}


def trained(kind: str) -> FastTokenizer:
    """A tokenizer of the library, whose special tokens are in its model's vocabulary."""
    model, parts, trainer = KINDS[kind]
    tokenizer = FastTokenizer(model)
    tokenizer.pre_tokenizer = parts
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def written(tokenizer: FastTokenizer, folder: Path, **settings: Any) -> Path:
    """A folder with the tokenizer as transformers writes it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_text_is_given_the_id_of_a_special_token(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind)
    ours = make_tokenizer("PretrainedFromHF", vocab_file=str(written(tokenizer, tmp_path)))
    forbidden = {tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")}
    tokenizer.encode_special_tokens = True
    assert forbidden & set(tokenizer.encode(SPELT[1]).ids), "the library alone would give the id"
    for one in (ours, pickle.loads(pickle.dumps(ours))):
        assert [one.encode(text) for text in SPELT] == one.encode_batch(SPELT)
        assert [ids.tolist() for ids in one.encode_arrays(SPELT)] == one.encode_batch(SPELT)
        assert not forbidden & {number for text in SPELT for number in one.encode(text)}
        assert ours.eod in one.encode_with_special_tokens(SPELT[1])
        for text in LINES[:2]:
            assert one.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_tokenizer_that_gives_no_such_ids_is_used_as_it_is() -> None:
    tokenizer = trained("whole words of bytes")
    tokenizer.model.ignore_merges = False
    tokenizer.encode_special_tokens = True
    special = {text: tokenizer.token_to_id(text) for text in SPECIAL}
    assert special_ids(tokenizer, special) == frozenset()
    assert without_special_tokens(tokenizer, special) is tokenizer


def test_a_piece_model_and_its_tokenizer_json_spell_the_same(tmp_path: Path) -> None:
    """What an export writes beside a Unigram .model makes the data that the .model makes, without end tokens inside."""
    train_sentence_piece(iter(LINES), 330, tmp_path / "made.model", algorithm="unigram")
    (tmp_path / "out").mkdir()
    portable_of(tmp_path / "made.model").write(tmp_path / "out", 512)
    own = make_tokenizer("SPMTokenizer", vocab_file=str(tmp_path / "made.model"))
    out = make_tokenizer("PretrainedFromHF", vocab_file=str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    for text in (*SPELT, *LINES[:2], "a <|endoftext|> b<|endoftext|>", "x<pad>y"):
        assert out.encode(text) == own.encode(text)
        assert own.eod not in out.encode(text)


def test_a_token_that_the_file_calls_special_stays_so(tmp_path: Path) -> None:
    """Where tokenizer_config.json calls it ordinary; the library never takes a token out of the special ones."""
    tokenizer = trained("whole words of bytes")
    tokenizer.add_special_tokens(["<|im_end|>"])
    number = str(tokenizer.token_to_id("<|im_end|>"))
    ordinary = {number: {"content": "<|im_end|>", "special": False, "normalized": False}}
    found = find_tokenizer(written(tokenizer, tmp_path, added_tokens_decoder=ordinary))
    assert found is not None
    text = "a<|im_end|>b"
    assert int(number) not in found.tokenizer.encode(text)
    assert found.tokenizer.encode(text) == found.tokenizer.encode_arrays([text])[0].tolist()
    assert int(number) in found.tokenizer.encode_with_special_tokens(text)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pad_token": "<fcel>"},
        {"image_token": "<fcel>"},
        {"extra_special_tokens": {"img_token": "<fcel>"}},
        {"extra_special_tokens": ["<fcel>"]},
        {"additional_special_tokens": ["<fcel>"]},
    ],
    ids=json.dumps,
)
def test_a_token_that_is_named_for_one_use_is_special(settings: dict[str, Any], tmp_path: Path) -> None:
    """Whether answers and data have an ordinary token of the file is what transformers decides by its name."""
    import transformers

    tokenizer = trained("whole words of bytes")
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<fcel>", "<nl>")])
    folder = written(tokenizer, tmp_path, **settings)
    theirs, found = transformers.AutoTokenizer.from_pretrained(str(folder)), find_tokenizer(folder)
    assert found is not None
    ids = theirs("A<fcel>B<nl>C").input_ids
    assert found.tokenizer.encode_with_special_tokens("A<fcel>B<nl>C") == ids
    assert found.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    named = tokenizer.token_to_id("<fcel>") in found.tokenizer.encode("A<fcel>B")
    assert named == ("<fcel>" in theirs.decode(ids, skip_special_tokens=True))
