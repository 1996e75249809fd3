"""Merging pairs: the bytes of one work, shards included, and pairs that do not go together."""

import gzip
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron.data.indexed.merge import find_pairs, merge
from megatron.data.indexed.reader import IndexedDataset
from megatron.data.indexed.writer import DatasetWriter
from megatron.data.preprocess.document_types import PlainText
from megatron.data.preprocess.input_shard import Shard, parse_shard
from megatron.data.preprocess.pipeline import preprocess
from megatron.data.preprocess.sentences import Sentences
from megatron.data.preprocess.text_files import find_text_files
from megatron.errors import ConfigError
from megatron.tokenizer_info import TokenizerInfo
from megatron.tokenizers import make_tokenizer

CHARACTERS = make_tokenizer("CharLevelTokenizer")


def write(prefix, documents, dtype="<u2"):
    with DatasetWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(document)


def pair(prefix):
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def test_documents_one_after_another(tmp_path):
    write(tmp_path / "in" / "a", [[1, 2], [3]])
    write(tmp_path / "in" / "b", [[]])
    write(tmp_path / "in" / "c", [[4], [5, 6]])
    write(tmp_path / "once", [[1, 2], [3], [], [4], [5, 6]])
    assert merge(find_pairs([str(tmp_path / "in")]), str(tmp_path / "out")) == (5, 6)
    assert pair(tmp_path / "out") == pair(tmp_path / "once")


@pytest.mark.parametrize("shards", [1, 2, 5, 40])
@pytest.mark.parametrize("sentences", [None, Sentences()])
def test_shards_merge_to_the_bytes_of_one_work(tmp_path, shards, sentences):
    texts = [f"Document {number}. It has words! " + "more words " * (number * 37 % 400) for number in range(60)]
    (tmp_path / "in").mkdir()
    for name, part in (("a", texts[:25]), ("b", texts[25:26]), ("c", texts[26:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (tmp_path / "in" / f"{name}.jsonl").write_text(lines)
    (tmp_path / "in" / "b2.txt").write_text("A whole file. It is one document.")
    packed = "".join(json.dumps({"text": text}) + "\n" for text in texts[:20]).encode()
    (tmp_path / "in" / "b3.jsonl.gz").write_bytes(gzip.compress(packed))
    (tmp_path / "in" / "d.jsonl.zst").write_bytes(zstandard.compress(packed))
    recipe = PlainText(CHARACTERS, append_eod=True, sentences=sentences)
    facts = TokenizerInfo("CharLevelTokenizer", 512, 0)
    files = find_text_files([str(tmp_path / "in")])
    once = preprocess(files, recipe, output_prefix=str(tmp_path / "once"), facts=facts).outputs[0]
    prefixes = [
        preprocess(files, recipe, output_prefix=str(tmp_path / "s" / "p"), facts=facts, shard=Shard(number, shards))
        .outputs[0]
        .prefix
        for number in range(shards)
    ]
    assert sorted(prefixes) == prefixes
    merge(prefixes, str(tmp_path / "merged"))
    assert once.card.documents == 101
    assert pair(tmp_path / "merged") == pair(once.prefix)
    assert Path(f"{tmp_path}/merged.json").read_text() == Path(f"{once.prefix}.json").read_text()


def test_sentences_stay_items_of_their_documents(tmp_path):
    (tmp_path / "a.txt").write_text("One here. Two there! Three.")
    (tmp_path / "b.txt").write_text("Four.")
    recipe = PlainText(CHARACTERS, sentences=Sentences())
    facts = TokenizerInfo("CharLevelTokenizer", 512, None)
    prefixes = []
    for name in "ab":
        files = find_text_files([str(tmp_path / f"{name}.txt")])
        prefixes.append(preprocess(files, recipe, output_prefix=str(tmp_path / name), facts=facts).outputs[0].prefix)
    merge(prefixes, str(tmp_path / "out"))
    data = IndexedDataset(tmp_path / "out")
    found = [CHARACTERS.decode(data[item].tolist()) for item in range(len(data))]
    assert found == ["One here.", "Two there!", "Three.", "Four."]
    assert data.document_index.tolist() == [0, 3, 4]


def test_different_dtypes(tmp_path):
    write(tmp_path / "a", [[1]])
    write(tmp_path / "b", [[1]], "<i4")
    with pytest.raises(ConfigError, match="int32"):
        merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "c"))


def test_an_output_that_is_an_input(tmp_path):
    write(tmp_path / "a", [[1]])
    with pytest.raises(ConfigError, match="one of the inputs"):
        merge([str(tmp_path / "a")], str(tmp_path / "a"))


def test_an_output_in_a_directory_of_the_input(tmp_path):
    write(tmp_path / "a", [[1]])
    with pytest.raises(ConfigError, match="in a directory of the input"):
        find_pairs([str(tmp_path)], str(tmp_path / "x" / ".." / "all"))
    assert find_pairs([str(tmp_path / "a")], str(tmp_path / "all")) == [str(tmp_path / "a")]
    assert find_pairs([str(tmp_path)], str(tmp_path / "x" / "all")) == [str(tmp_path / "a")]


def test_an_earlier_merge_in_a_directory_of_the_input(tmp_path):
    write(tmp_path / "a", [[1, 2], [3]])
    write(tmp_path / "c", [[4], [5, 6]])
    pairs = find_pairs([str(tmp_path)])
    merge(pairs, str(tmp_path / "b"))
    with pytest.raises(ConfigError, match="documents of the 2 other pairs") as caught:
        find_pairs([str(tmp_path)], str(tmp_path / "x" / "all"))
    assert f"input = {str(tmp_path / 'b')!r}" in str(caught.value)
    write(tmp_path / "b", [[7], [8]])
    assert len(find_pairs([str(tmp_path)])) == 3


def test_half_a_pair(tmp_path):
    write(tmp_path / "a", [[1]])
    (tmp_path / "a.idx").unlink()
    with pytest.raises(ConfigError, match=r"a\.idx is missing"):
        find_pairs([str(tmp_path)])


@pytest.mark.parametrize("reported", ["3/3", "1", "a/2", "-1/2", "0/0"])
def test_shards_that_are_none(reported):
    with pytest.raises(ConfigError, match="0 to N - 1"):
        parse_shard(reported)


@pytest.mark.parametrize("by_folder", [True, False])
@pytest.mark.parametrize(
    ("names", "reported"),
    [
        (["p-00000-of-00003", "p-00002-of-00003"], "p-*_text_document': 1 of 3 shards are missing: 1;"),
        (["p-00001-of-00002"], "1 of 2 shards are missing: 0;"),
        (["p-00000-of-00012"], "11 of 12 shards are missing: 1, 2, 3, 4, 5, 6, 7, 8, ...;"),
        (["p-00000-of-00001", "q-00000-of-00002"], "q-*_text_document': 1 of 2 shards are missing: 1;"),
        (["p-00000-of-00001", "p-00000-of-00002", "p-00001-of-00002"], "shards of 1 and of 2"),
    ],
)
def test_an_incomplete_set_of_shards(tmp_path, names, reported, by_folder):
    prefixes = [str(tmp_path / f"{name}_text_document") for name in names]
    for prefix in prefixes:
        write(prefix, [[1]])
    with pytest.raises(ConfigError) as caught:
        merge(find_pairs([str(tmp_path)]) if by_folder else prefixes, str(tmp_path / "out"))
    assert reported in str(caught.value)
    assert not (tmp_path / "out.bin").exists()


def test_full_sets_of_shards_and_other_names(tmp_path):
    for name in ("p-00000-of-00002", "p-00001-of-00002", "q-00000-of-00001", "other-1-of-9", "plain"):
        write(tmp_path / f"{name}_text_document", [[1]])
    assert merge(find_pairs([str(tmp_path)]), str(tmp_path / "out")) == (5, 5)


def test_numbers_in_names_are_in_their_order(tmp_path):
    for number in (0, 1, 2, 10, 11):
        write(tmp_path / "in" / f"part_{number}_text", [[number]])
    merge(find_pairs([str(tmp_path / "in")]), str(tmp_path / "out"))
    assert IndexedDataset(tmp_path / "out").tokens.tolist() == [0, 1, 2, 10, 11]


def test_more_pairs_than_a_process_may_open(tmp_path):
    for number in range(140):
        write(tmp_path / "many" / f"p{number}", [[number]])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert merge(find_pairs([str(tmp_path / "many")]), str(tmp_path / "all")) == (140, 140)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert IndexedDataset(str(tmp_path / "all")).tokens.tolist() == list(range(140))
