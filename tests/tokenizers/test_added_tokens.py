"""Tokens that a folder adds to its vocabulary: the ids and the size that transformers has."""

import json
import pickle

import pytest

from megatron.errors import ConfigError
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.chat_encoding import ChatTokens
from megatron.tokenizers.from_folder import find_tokenizer
from megatron.tokenizers.to_folder import portable
from tests.tokenizers import made

TEXTS = [
    "def f(x):\n    return x\n        y",
    "<|user|>Hello <|user|> world<|tool|><|endoftext|>",
    "a<new>b <new> c[PAD]d <mask>e <x1> <x2>",
    "plain text 0 1 2",
]
END = {made.gpt2: "<|endoftext|>", made.chatml: "<|endoftext|>", made.llama3: "<|end_of_text|>"}
USER, TOOL, NEW = "<|user|>", "<|tool|>", "<new>"


def folder_of(folder, config, *, added=None, names=None, build=made.gpt2):
    """A folder of a small vocabulary with these files beside it; `{end}` in them stands for the first free id."""
    from transformers import AutoTokenizer

    build(folder)
    path = folder / "tokenizer_config.json"
    kind = {"tokenizer_class": "GPT2TokenizerFast" if build is made.gpt2 else "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(kind))
    free = len(AutoTokenizer.from_pretrained(folder))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps({text: free + at for text, at in added.items()}))
    if names is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(names))
    if "added_tokens_decoder" in config:
        numbered = {str(free + at): token for at, token in config["added_tokens_decoder"].items()}
        config = {**config, "added_tokens_decoder": numbered}
    path.write_text(json.dumps({"eos_token": END[build], **kind, **config}))
    return folder


def token(content, **flags):
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, **flags}


CASES = {
    "added_tokens.json": ({}, {"    ": 0, USER: 1}, None),
    "a special one in it": ({"additional_special_tokens": [USER]}, {USER: 0, NEW: 1}, None),
    "out of order": ({}, {NEW: 2, TOOL: 0, USER: 1}, None),
    "decoder": ({"added_tokens_decoder": {0: token(USER, special=True), 1: token(NEW, special=False)}}, None, None),
    "decoder with flags": (
        {"added_tokens_decoder": {1: token(NEW, lstrip=True), 0: token(USER, special=True, rstrip=True)}},
        None,
        None,
    ),
    "decoder goes before the file": ({"added_tokens_decoder": {0: token(NEW, special=True)}}, {USER: 0}, None),
    "named only": (
        {"pad_token": "[PAD]", "mask_token": "<mask>", "extra_special_tokens": ["<x1>"]},
        None,
        None,
    ),
    "named in a map": ({}, {NEW: 0}, {"pad_token": "[PAD]", "mask_token": token("<mask>", lstrip=True)}),
    "an end that is added": ({"eos_token": TOOL}, None, None),
    "nothing": ({}, None, None),
}


@pytest.mark.parametrize("build", [made.gpt2, made.chatml, made.llama3], ids=["plain", "one file", "headers"])
@pytest.mark.parametrize("case", CASES)
def test_ids_and_size_are_those_of_transformers(tmp_path, case, build):
    from transformers import AutoTokenizer

    config, added, names = CASES[case]
    folder = folder_of(tmp_path, config, added=added, names=names, build=build)
    ours = make_tokenizer("PretrainedFromHF", vocab_file=str(folder))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert ours.eod == theirs.eos_token_id
    for text in TEXTS:
        assert ours.encode_with_special_tokens(text) == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("case", CASES)
def test_a_completed_folder_keeps_what_each_added_token_is(tmp_path, case):
    """Of GPT-2's two files: documents, prompts and texts without special tokens are those of the folder as it was."""
    from transformers import AutoTokenizer

    config, added, names = CASES[case]
    if case == "decoder with flags":
        config = {"added_tokens_decoder": {0: token("text", single_word=True), 1: token(NEW, lstrip=True)}}
    folder = folder_of(tmp_path, config, added=added, names=names)
    before = AutoTokenizer.from_pretrained(folder)
    found = find_tokenizer(folder, complete=True)
    after = AutoTokenizer.from_pretrained(folder)
    assert found.tokenizer is not None and found.tokenizer.vocab_size == len(after) == len(before)
    for text in TEXTS:
        ids = before.encode(text, add_special_tokens=False)
        assert found.tokenizer.encode_with_special_tokens(text) == ids == after.encode(text, add_special_tokens=False)
        assert found.tokenizer.encode(text) == before.encode(text, add_special_tokens=False, split_special_tokens=True)
        for skip in (False, True):
            assert after.decode(ids, skip_special_tokens=skip) == before.decode(ids, skip_special_tokens=skip)


def test_padding_comes_behind_what_is_added(tmp_path):
    folder = folder_of(tmp_path, {}, added={"    ": 0, "<|user|>": 1})
    plain = make_tokenizer("PretrainedFromHF", vocab_file=str(folder))
    padded = make_tokenizer("HFGPT2Tokenizer", vocab_file=str(folder))
    assert padded.vocab_size == plain.vocab_size + 1
    assert padded.special_tokens["<|padding|>"] == plain.vocab_size
    assert padded.encode("<|user|>") == plain.encode("<|user|>") == [plain.vocab_size - 1]


def test_a_text_spells_no_special_token_that_is_added(tmp_path):
    config = {"added_tokens_decoder": {0: token("<|user|>", special=True)}}
    ours = make_tokenizer("PretrainedFromHF", vocab_file=str(folder_of(tmp_path, config)))
    assert ours.special_tokens["<|user|>"] not in ours.encode("<|user|>")
    assert ours.decode(ours.encode("<|user|>")) == "<|user|>"


@pytest.mark.parametrize("content", ["[", "[1]", '{"a": "b"}'])
def test_damaged_files_are_reported(tmp_path, content):
    folder = folder_of(tmp_path, {})
    (folder / "added_tokens.json").write_text(content)
    with pytest.raises(ConfigError, match="added tokens"):
        make_tokenizer("PretrainedFromHF", vocab_file=str(folder))


SPELT = "<|im_start|>user\nhi<|im_end|> a<|endoftext|>b </s> [MASK] <|end_of_text|>x"
SPLITS = {"mask_token": "[MASK]", "split_special_tokens": True, "chat_template": made.CHATML}


@pytest.mark.parametrize("build", [made.gpt2, made.chatml, made.llama3], ids=["plain", "one file", "headers"])
def test_special_tokens_are_text_where_the_folder_says_so(tmp_path, build):
    """In prompts, in conversations, in what is exported, and after a trip to another process."""
    from transformers import AutoTokenizer

    folder = folder_of(tmp_path / "theirs", SPLITS, build=build)
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.encode(SPELT, add_special_tokens=False)
    assert expected != theirs.encode(SPELT, add_special_tokens=False, split_special_tokens=False)
    ours = make_tokenizer("PretrainedFromHF", vocab_file=str(folder))
    for each in (ours, pickle.loads(pickle.dumps(ours))):
        assert each.encode_with_special_tokens(SPELT) == expected
    turns = [{"role": "user", "content": SPELT}, {"role": "assistant", "content": "you"}]
    ids, learnt = ChatTokens(str(folder)).encode(turns, role="assistant", only_last=False)
    assert ids == theirs.apply_chat_template(turns, return_dict=False)
    assert "you" in theirs.decode([one for one, counts in zip(ids, learnt, strict=True) if counts])


def test_vocabularies_of_other_kinds_split_special_tokens_too(tmp_path):
    """Of BERT's words, and of GPT-2's two files, whose tokenizer is exported."""
    from transformers import AutoTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "sep", "[", "]", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "split_special_tokens": true}'
    )
    bert = make_tokenizer("BertWordPieceLowerCase", vocab_file=str(tmp_path / "vocab.txt"))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert bert.encode_with_special_tokens("a[SEP] b") == theirs.encode("a[SEP] b", add_special_tokens=False)
    assert bert.eod not in bert.encode_with_special_tokens("a[SEP] b")
    gpt2 = folder_of(tmp_path / "gpt2", {"split_special_tokens": True})
    expected = AutoTokenizer.from_pretrained(gpt2).encode(SPELT, add_special_tokens=False)
    files = {"vocab_file": str(gpt2 / "vocab.json"), "merge_file": str(gpt2 / "merges.txt")}
    assert make_tokenizer("GPT2BPETokenizer", **files).encode_with_special_tokens(SPELT) == expected
    (tmp_path / "back").mkdir()
    portable("GPT2BPETokenizer", files["vocab_file"], files["merge_file"]).write(tmp_path / "back", None)
    assert AutoTokenizer.from_pretrained(tmp_path / "back").encode(SPELT, add_special_tokens=False) == expected
