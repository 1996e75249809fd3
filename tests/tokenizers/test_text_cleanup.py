"""A line at import where transformers takes blanks out of decoded texts, against transformers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron.tokenizers.huggingface import HFTokenizer
from megatron.tokenizers.tokenizer_config import unapplied_cleanup

WORDS = {"[UNK]": 0, "we": 1, ".": 2, "go": 3}
SPELT = {"[UNK]": 0, "w": 1, ".": 2, "\u0120": 3, "e": 4, "g": 5, "o": 6}
PIECES = [("<unk>", 0.0), ("\u2581we", -1.0), ("\u2581.", -1.0), ("\u2581go", -1.0)]


def kind(name: str) -> Tokenizer:
    if name == "merges":
        made = Tokenizer(models.BPE(SPELT, [], unk_token="[UNK]"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif name == "unigram":
        made = Tokenizer(models.Unigram(PIECES, unk_id=0))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        made = Tokenizer(models.WordLevel(WORDS, "[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.decoder = decoders.WordPiece(cleanup=True) if name == "word pieces" else None
    return made


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("name", ["merges", "unigram", "words", "word pieces"])
def test_only_another_text_of_transformers_is_named(tmp_path: Path, name: str, asked: bool) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=kind(name), clean_up_tokenization_spaces=asked, eos_token="go")
    theirs.save_pretrained(tmp_path)
    ours = HFTokenizer(str(tmp_path / "tokenizer.json"))
    ids = ours.encode("we .")
    assert ids == theirs.encode("we .")
    same = ours.decode(ids) == PreTrainedTokenizerFast.from_pretrained(tmp_path).decode(ids)
    assert (unapplied_cleanup(tmp_path) is None) == same
    assert same == (not asked or name in ("merges", "word pieces"))


def test_a_folder_without_a_tokenizer_has_no_line(tmp_path: Path) -> None:
    assert unapplied_cleanup(tmp_path) is None
