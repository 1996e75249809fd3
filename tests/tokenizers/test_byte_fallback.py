"""Vocabularies that spell unknown characters by bytes which the file calls special tokens: bytes are text in data.

The reference is `transformers` where no text spells a token, and the text itself where one does. What would break it:
hiding a name that the model looks up (every such character becomes `<unk>`), or leaving out bytes in decoding.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.fast import FromTokenizers

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "</s>", *BYTES]
WITH_BRACKETS = [
    "the quick brown fox jumps over the lazy dog",
    "a page about tags </ > < s |> end of text 0123456789xABCDEF",
]
WITHOUT = [line.translate(dict.fromkeys(map(ord, "<>|"))) for line in WITH_BRACKETS]
KINDS = {
    "merges": ("BPE", {}, WITH_BRACKETS),
    "merges, no brackets": ("BPE", {}, WITHOUT),
    "whole words": ("BPE", {"ignore_merges": True}, WITH_BRACKETS),
    "whole words, no brackets": ("BPE", {"ignore_merges": True}, WITHOUT),
    "unigram": ("Unigram", {}, WITH_BRACKETS),
    "unigram, no brackets": ("Unigram", {}, WITHOUT),
}
PLAIN = ["日本 🙂 of the fox", "é|x < y > z", "the lazy dog", "\n\n日"]
SPELT = ["a <0xE6> b", "<0xE6>", "x<0xE6><0x41>y </s> z", "<0xE6>日<0x0A>"]


def written(kind: str, folder: Path) -> Path:
    """A folder of transformers with a tokenizer whose bytes are special tokens."""
    name, flags, lines = KINDS[kind]
    tokenizer = FastTokenizer(getattr(models, name)())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    settings = {"vocab_size": 400, "special_tokens": SPECIAL, "show_progress": False}
    unknown = {"unk_token": "<unk>"} if name == "Unigram" else {}
    tokenizer.train_from_iterator(lines * 30, getattr(trainers, f"{name.title()}Trainer")(**settings, **unknown))
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)]
    )
    content = json.loads(tokenizer.to_str())
    content["model"] |= {"byte_fallback": True, **flags, **({} if unknown else {"unk_token": "<unk>"})}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_unknown_characters_are_bytes_in_data(kind: str, tmp_path: Path) -> None:
    import transformers

    ours = make_tokenizer("PretrainedFromHF", vocab_file=str(written(kind, tmp_path)))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    unknown = theirs.convert_tokens_to_ids("<unk>")
    for text in PLAIN:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text) == ids == ours.encode_with_special_tokens(text)
        assert unknown not in ids
        assert ours.decode(ids) == text
    byte = theirs.convert_tokens_to_ids("<0xE6>")
    assert ours.bytes_of(byte) == b"\xe6"
    assert byte in ours.encode_with_special_tokens(SPELT[0]) == theirs(SPELT[0]).input_ids
    assert ours.encode_batch(SPELT) == [ours.encode(text) for text in SPELT]
    for text in SPELT:
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert ours.eod not in ids and unknown not in ids
        assert ids.count(byte) == text.count("日"), "a byte of the character, and none that is spelt"
        assert [ids.tolist() for ids in ours.encode_arrays([text])] == [ids]


def test_characters_that_stand_for_blanks_and_bytes_stay() -> None:
    """Where a file calls them special, as some name "!" for padding: a text has them without spelling a token."""
    spaced = FastTokenizer(models.BPE(unk_token="<unk>", ignore_merges=True))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace()
    spaced.train_from_iterator(
        WITH_BRACKETS,
        trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>", "\u2581"], show_progress=False),
    )
    bytewise = FastTokenizer(models.BPE(ignore_merges=True))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["!", "</s>", "<|end|>"]
    bytewise.train_from_iterator(
        WITH_BRACKETS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    for tokenizer, text in ((spaced, "the  fox s"), (bytewise, "so! it! is!")):
        plain = FastTokenizer.from_str(tokenizer.to_str())
        plain.encode_special_tokens = True
        ours = FromTokenizers(tokenizer, "</s>", None)
        assert ours.encode(text) == plain.encode(text, add_special_tokens=False).ids
        assert ours.eod not in ours.encode("a </s> b</s>")


def test_a_special_token_that_merges_name_leaves_the_others_hidden() -> None:
    """A name within merges stays, since they name it; the others are hidden all the same."""
    vocabulary = {text: number for number, text in enumerate(["<unk>", "</s>", "<s>", "a", "b", "ab", *"</s>"])}
    tokenizer = FastTokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>", ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>", "ab"])
    ours = FromTokenizers(tokenizer, "</s>", None)
    assert ours.encode("<s> ab </s>") == [vocabulary[one] for one in (*"<s>", *"ab", *"</s>")]
