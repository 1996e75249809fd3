"""Data of one tokenizer under another: refused by what the card says, or where an id is read that no token has."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.config.schema.data import DataSection
from megatron.data.indexed.merge import merge
from megatron.data.indexed.metadata import DatasetCard, read_card
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import DatasetWriter
from megatron.errors import ConfigError, RunError
from megatron.registry import TOKENIZERS
from megatron.tokenizer_info import FROM_FILES, TokenizerInfo, describe_tokenizer
from megatron.tokenizers import make_tokenizer
from tests.data.test_build import build, documents, served, write
from tests.data.test_labels import write_signed
from tools.inspect_dataset import main as inspect
from tools.preprocess_data import main as preprocess

TEXTS = ["the theory of the brown fox", "it returns a list of values", "over and over the lazy dog again"] * 8


def train_tokenizer(path, texts=TEXTS, size=300):
    """A byte-level BPE in a tokenizer.json."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    path.parent.mkdir(exist_ok=True)
    made.save(str(path))
    return str(path)


def tokenized(folder, name, kind, vocab_file=None, *more):
    """Token files that the tool made of a text with that tokenizer; their prefix."""
    folder.mkdir(exist_ok=True)
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    arguments = ["--input", str(source), "--output-prefix", str(folder / name), "--tokenizer-type", kind, *more]
    assert preprocess([*arguments, *(["--vocab-file", vocab_file] if vocab_file else [])]) == 0
    return str(folder / f"{name}_text_document")


def facts(kind, vocab_file=None):
    return describe_tokenizer(kind, make_tokenizer(kind, vocab_file=vocab_file))


def refused(section, tokenizer, **required):
    with pytest.raises(ConfigError) as caught:
        build(section, tokenizer=tokenizer, **required)
    return caught.value


def test_another_tokenizer_is_refused_with_both_names(tmp_path):
    plain = train_tokenizer(tmp_path / "plain.json")
    data = tokenized(tmp_path, "bytes", "CharLevelTokenizer", None, "--append-eod")
    section = DataSection(data_path=data, num_workers=0)
    error = refused(section, facts("HFTokenizer", plain))
    (issue,) = error.issues
    assert (issue.key, issue.value) == ("data_path", data)
    assert "CharLevelTokenizer of 512 tokens" in str(error)
    assert "HFTokenizer of 300 tokens" in str(error)
    assert build(section, tokenizer=facts("CharLevelTokenizer")).train is not None


def test_a_vocabulary_of_the_same_size_is_another_one(tmp_path):
    """Two files of 300 tokens each, which no number in the metadata distinguishes."""
    plain = train_tokenizer(tmp_path / "plain.json")
    other = train_tokenizer(tmp_path / "other.json", texts=["zzz yyy xxx qqq www"] * 9)
    section = DataSection(data_path=tokenized(tmp_path, "p", "HFTokenizer", plain), num_workers=0)
    assert "fingerprint" in str(refused(section, facts("HFTokenizer", other)))


def test_the_same_content_elsewhere_is_the_same_tokenizer(tmp_path):
    """Another path, and another kind that reads the same file."""
    plain = train_tokenizer(tmp_path / "plain.json")
    copied = tmp_path / "moved" / "tokenizer.json"
    copied.parent.mkdir()
    copied.write_bytes(Path(plain).read_bytes())
    section = DataSection(data_path=tokenized(tmp_path, "p", "HFTokenizer", plain, "--append-eod"), num_workers=0)
    for tokenizer in (facts("HFTokenizer", str(copied)), facts("PretrainedFromHF", str(copied.parent))):
        assert build(section, tokenizer=tokenizer).train is not None


@pytest.mark.parametrize(
    ("card", "run", "same"),
    [
        (("HFTokenizer", 300, 0), ("HFTokenizer", 300, 0), True),
        (("HFTokenizer", 300, None), ("HFTokenizer", 300, 0), True),
        (("HFTokenizer", 300, 0), ("PretrainedFromHF", 300, 0), True),
        (("HFTokenizer", 300, 0), ("HFTokenizer", 300, 2), False),
        (("HFTokenizer", 400, 0), ("HFTokenizer", 300, 0), False),
        (("HFTokenizer", 200, 0), ("HFTokenizer", 300, 0), False),
        (("CharLevelTokenizer", 300, 0), ("HFTokenizer", 300, 0), False),
        (("HFTokenizer", 300, 0, "a"), ("HFTokenizer", 300, 0, "b"), False),
        (("HFTokenizer", 300, 0, "a"), ("PretrainedFromHF", 300, 0, "a"), True),
        (("HFTokenizer", 300, 0, "a"), ("HFTokenizer", 300, 0), True),
    ],
)
def test_what_makes_two_the_same(card, run, same):
    assert TokenizerInfo(*card).agrees_with(TokenizerInfo(*run)) == same
    assert TokenizerInfo(*run).agrees_with(TokenizerInfo(*card)) == same


def test_the_kinds_that_share_files_exist():
    assert set(TOKENIZERS.names) >= FROM_FILES


def test_a_card_of_an_earlier_version_is_read(tmp_path):
    """It has no fingerprint; one of a later version may have more."""
    made = documents(20)
    total = sum(map(len, made))
    known = {"documents": 20, "tokens": total, "text_bytes": 9, "tokenizer_type": "HFTokenizer", "vocab_size": 40}
    path = write(tmp_path / "p", made)
    for card in (known | {"eod": 0}, known | {"eod": 0, "fingerprint": None, "later": 1}):
        Path(f"{path}.json").write_text(json.dumps(card))
        assert "of 40 tokens" in str(refused(DataSection(data_path=path), TokenizerInfo("HFTokenizer", 300, 0)))


@pytest.mark.parametrize("named", ["train_data_paths", "valid_data_paths", "train_label_data_paths"])
def test_every_named_set_is_looked_at(tmp_path, named):
    made = documents(20)
    sizes = sum(map(len, made))
    good, bad = DatasetCard(20, sizes, 9, "HFTokenizer", 300, 0), DatasetCard(20, sizes, 9, "HFTokenizer", 301, 0)
    paths = {}
    for key in ("train_data_paths", "valid_data_paths", "train_label_data_paths"):
        paths[key] = [write_signed(tmp_path / key, made)]
        Path(f"{paths[key][0]}.json").write_text((bad if key == named else good).to_json())
    error = refused(DataSection(**paths, num_workers=0), TokenizerInfo("HFTokenizer", 300, 0), valid=4)
    assert [(issue.key, issue.value) for issue in error.issues] == [(named, paths[named][0])]


@pytest.mark.parametrize("packing", ["packed", "unpacked", "pack_until_overflow"])
@pytest.mark.parametrize("blended", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_id_beyond_the_vocabulary_is_named_where_no_card_is(tmp_path, packing, blended, workers):
    """The 7th document of the second set holds the id 5000."""
    first, second = documents(20), documents(20)
    second[7] = second[7].copy()
    second[7][3] = 5000
    paths = [write(tmp_path / "a", first), write(tmp_path / "b", second)]
    section = DataSection(
        train_data_paths=paths if blended else paths[1:],
        num_workers=workers,
        pack_impl=packing,
        train_data_weights=None,
    )
    sound = TokenizerInfo("HFTokenizer", 5001, 0)
    assert served(build(section, train=60, tokenizer=sound).train)
    with pytest.raises(RunError) as caught:
        served(build(section, train=60, tokenizer=TokenizerInfo("HFTokenizer", 5000, 0)).train)
    (issue,) = caught.value.issues
    assert issue.location == paths[1]
    assert "document 7 holds the id 5000, and the tokenizer's ids are 0 to 4999" in issue.message


def test_negative_ids_and_labels_beyond_the_vocabulary_are_named(tmp_path):
    made = [np.array(row) for row in documents(20)]
    negative = [row.copy() for row in made]
    negative[2][0] = -7
    tokenizer = TokenizerInfo("HFTokenizer", 1000, 0)
    section = DataSection(train_data_paths=[write_signed(tmp_path / "n", negative)], num_workers=0)
    with pytest.raises(RunError, match="n: document 2 holds the id -7"):
        served(build(section, train=60, tokenizer=tokenizer).train)
    labels = [np.where(row % 2, -100, row) for row in made]
    labels[3][2] = 1000
    section = DataSection(
        train_data_paths=[write_signed(tmp_path / "t", made)],
        train_label_data_paths=[write_signed(tmp_path / "l", labels)],
        num_workers=0,
    )
    with pytest.raises(RunError, match="l: document 3 holds the id 1000"):
        served(build(section, train=60, tokenizer=tokenizer).train)


def test_public_data_without_a_card_trains(tmp_path):
    section = DataSection(data_path=write(tmp_path / "p", documents(20)), num_workers=0)
    assert served(build(section, tokenizer=TokenizerInfo("HFTokenizer", 1000, 3)).train)


def test_merging_refuses_files_of_two_tokenizers(tmp_path):
    plain = train_tokenizer(tmp_path / "plain.json")
    other = train_tokenizer(tmp_path / "other.json", texts=["zzz yyy xxx qqq www"] * 9)
    ours = tokenized(tmp_path, "a", "HFTokenizer", plain)
    again = tokenized(tmp_path, "b", "HFTokenizer", plain)
    theirs = tokenized(tmp_path, "c", "HFTokenizer", other)
    with pytest.raises(ConfigError, match="another tokenizer made it") as caught:
        merge([ours, again, theirs], str(tmp_path / "all"))
    assert [issue.value for issue in caught.value.issues] == [theirs]
    assert not (tmp_path / "all.bin").exists()
    merge([ours, again], str(tmp_path / "all"))
    data = IndexedDataset(tmp_path / "all")
    card = read_card(tmp_path / "all", documents=len(data), tokens=len(data.tokens))
    assert card is not None
    assert card.fingerprint == facts("HFTokenizer", plain).fingerprint


def test_merging_takes_files_without_a_card(tmp_path):
    for name in ("a", "b"):
        with DatasetWriter(tmp_path / name, np.dtype("<u2")) as writer:
            writer.add_document([1, 2])
    assert merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "all")) == (2, 4)


def test_showing_documents_with_another_tokenizer_is_refused(tmp_path, capsys):
    data = tokenized(tmp_path, "p", "CharLevelTokenizer")
    plain = train_tokenizer(tmp_path / "plain.json")
    reported = [data, "--document", "0", "--tokenizer-type", "HFTokenizer", "--vocab-file", plain]
    assert inspect(reported) == 2
    assert "another tokenizer made" in capsys.readouterr().err
    assert inspect([data, "--document", "0", "--tokenizer-type", "CharLevelTokenizer"]) == 0
    assert TEXTS[0] in capsys.readouterr().out
