"""HFTokenizer: what the file asks for that would change a training set is turned off, and bad files are refused."""

import json
import pickle

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron.errors import ConfigError
from megatron.tokenizer_info import describe_tokenizer
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.to_folder import portable
from tests.tokenizers import made


def plain(specials=("<|endoftext|>",)):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some words to learn from, some more words"], trainer)
    return tokenizer


def load(tokenizer, folder):
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return make_tokenizer("HFTokenizer", vocab_file=str(path))


def test_truncation_padding_and_added_tokens_are_turned_off(tmp_path):
    source = plain(("<|endoftext|>", "<s>"))
    expected = source.encode("some words " * 50).ids
    source.enable_truncation(8)
    source.enable_padding(length=16)
    source.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=[("<s>", 1), ("<|endoftext|>", 0)]
    )
    assert source.encode("some words " * 50).ids != expected
    loaded = load(source, tmp_path)
    assert loaded.encode("some words " * 50) == expected
    assert loaded.encode_batch(["some words " * 50, "some"])[0] == expected


def test_merges_are_never_left_to_chance(tmp_path):
    source = plain()
    expected = source.encode("some words " * 50).ids
    source.model.dropout = 0.5
    assert source.encode("some words " * 50).ids != expected
    loaded = load(source, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    folder = make_tokenizer("PretrainedFromHF", vocab_file=str(tmp_path))
    for tokenizer in (loaded, pickle.loads(pickle.dumps(loaded)), folder):
        assert tokenizer.encode("some words " * 50) == expected
        assert tokenizer.encode_with_special_tokens("some words " * 50) == expected
        assert tokenizer.encode_arrays(["some words " * 50])[0].tolist() == expected
    assert describe_tokenizer("HFTokenizer", load(source, tmp_path)) == describe_tokenizer("HFTokenizer", loaded)
    given = portable("PretrainedFromHF", str(tmp_path), None)
    assert given.other and Tokenizer.from_str(given.content).encode("some words " * 50).ids == expected


def test_an_end_of_document_that_the_file_calls_ordinary_cannot_be_forged(tmp_path):
    source = plain(())
    source.add_tokens([AddedToken("<|endoftext|>", special=False)])
    eod = source.token_to_id("<|endoftext|>")
    assert eod in source.encode("a<|endoftext|>b").ids
    loaded = load(source, tmp_path)
    assert loaded.eod == eod
    assert eod not in loaded.encode("a<|endoftext|>b")
    assert loaded.decode(loaded.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def test_ordinary_added_tokens_keep_working(tmp_path):
    source = plain()
    source.add_tokens([AddedToken("        ", special=False, normalized=False)])
    loaded = load(source, tmp_path)
    assert loaded.encode("        ") == [source.token_to_id("        ")]


def test_ids_with_gaps_have_rows_in_the_embedding(tmp_path):
    path = tmp_path / "tokenizer.json"
    content = json.loads(plain().to_str())
    content["added_tokens"].append(
        {
            "id": 400,
            "content": "<extra>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
    )
    content["model"]["vocab"]["<extra>"] = 400
    path.write_text(json.dumps(content))
    loaded = make_tokenizer("HFTokenizer", vocab_file=str(path))
    assert loaded.encode("<extra>") == [400]
    assert loaded.vocab_size == 401


def test_a_normaliser_is_reported(tmp_path):
    source = plain()
    source.normalizer = normalizers.NFC()
    assert not load(source, tmp_path).lossless


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        (None, "cannot read"),
        (b"{", "not a tokenizer.json"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "pointer of git-lfs and not the file itself; git lfs pull",
        ),
        (
            b'{"version": "1.0", "added_tokens": [], "model": {"type": "New"}}',
            "a newer release may have written it: pip install -U tokenizers",
        ),
        (b'{"model": 3}', "not a tokenizer.json"),
        (b'{"model": 3, "type": 4}', "not a tokenizer.json"),  # a vocab.json that has these words
        (b"\xff\xfe", "UTF-8"),
        (plain(("<pad>",)).to_str().encode(), "<|endoftext|>"),
    ],
)
def test_unusable_files_are_refused(tmp_path, content, reported):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        make_tokenizer("HFTokenizer", vocab_file=str(path))
    (issue,) = caught.value.issues
    assert reported in f"{issue.message}; {issue.hint}"
    assert issue.key == "vocab_file"
    assert issue.hint


def test_a_file_is_needed():
    with pytest.raises(ConfigError, match=r"needs a tokenizer\.json"):
        make_tokenizer("HFTokenizer")


def test_a_misspelt_kind_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="HFTokenizer"):
        make_tokenizer("HFTokeniser")


def test_the_end_is_that_of_the_file_or_of_what_is_beside_it(tmp_path):
    """`<|endoftext|>` goes first; a pretrained model's own end is taken from its tokenizer_config.json."""
    folder = made.llama3(tmp_path / "headers")
    found = make_tokenizer("HFTokenizer", vocab_file=str(folder / "tokenizer.json"))
    full = make_tokenizer("PretrainedFromHF", vocab_file=str(folder))
    assert (found.eod, found.vocab_size) == (full.eod, full.vocab_size)
    both = made.chatml(tmp_path / "both")
    ours = make_tokenizer("HFTokenizer", vocab_file=str(both / "tokenizer.json"))
    assert ours.eod == ours.special_tokens["<|endoftext|>"] != ours.special_tokens["<|im_end|>"]


@pytest.mark.parametrize("beside", [None, {}, {"eos_token": "<not there>"}])
def test_a_file_without_an_end_names_ways_that_keep_the_vocabulary(tmp_path, beside):
    folder = made.llama3(tmp_path)
    config = folder / "tokenizer_config.json"
    config.unlink() if beside is None else config.write_text(json.dumps(beside))
    with pytest.raises(ConfigError) as caught:
        make_tokenizer("HFTokenizer", vocab_file=str(folder / "tokenizer.json"))
    reported = str(caught.value)
    assert "eos_token" in reported
    assert "PretrainedFromHF" in reported
    assert "add <|endoftext|>" not in reported
