"""Reading text files: every compression, blocks that lose nothing, and damage that is told."""

import bz2
import gzip
import json
import lzma

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.blocks import read_blocks
from megatron.data.encode import Counted, records_of
from megatron.data.text_files import find_text_files
from megatron.errors import ConfigError, RunError

LINES = b"".join(json.dumps({"text": f"document {number} " * 9}).encode() + b"\n" for number in range(400))
COMPRESSED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def content(path, **settings):
    return b"".join(block.load() for block in read_blocks(find_text_files([str(path)]), **settings))


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_every_compression(tmp_path, suffix):
    path = tmp_path / f"lines.jsonl{suffix}"
    path.write_bytes(COMPRESSED[suffix](LINES))
    assert content(path, block_bytes=1000) == LINES


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_compressed_file_that_was_cut_short(tmp_path, suffix):
    path = tmp_path / f"lines.jsonl{suffix}"
    path.write_bytes(COMPRESSED[suffix](LINES)[:-20])
    with pytest.raises(RunError, match="cannot be read on from byte") as caught:
        content(path)
    assert caught.value.mistakes[0].where == str(path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_file_that_is_not_compressed_as_its_name_says(tmp_path, suffix):
    path = tmp_path / f"lines.jsonl{suffix}"
    path.write_bytes(LINES)
    with pytest.raises(RunError, match="cannot be read"):
        content(path)


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=20),
    size=st.integers(1, 50),
)
def test_blocks_are_whole_lines_and_lose_nothing(tmp_path_factory, lines, size):
    path = tmp_path_factory.mktemp("text") / "lines.jsonl"
    whole = b"\n".join(lines) or b"x"
    path.write_bytes(whole)
    blocks = list(read_blocks(find_text_files([str(path)]), block_bytes=size))
    assert b"".join(block.load() for block in blocks) == whole.removeprefix(b"\xef\xbb\xbf")
    assert all(block.load().endswith(b"\n") for block in blocks[:-1])
    assert [block.begins for block in blocks] == [True, *([False] * (len(blocks) - 1))]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n')
    (block,) = read_blocks(find_text_files([str(path)]))
    assert list(records_of(block, ("text",), [], Counted())) == [(1, {"text": "a"})]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    (block,) = read_blocks(find_text_files([str(tmp_path / "a.txt.gz")]))
    assert list(records_of(block, ("text",), [], Counted())) == [(0, {"text": "one\ntwo\n"})]


def test_a_directory_stands_for_its_text_files(tmp_path):
    for name in ("b.jsonl", "a.txt", "picture.png", "below/c.jsonl.xz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_text_files([str(tmp_path)])
    assert [file.path.name for file in found] == ["a.txt", "b.jsonl", "c.jsonl.xz"]


def test_the_share_that_was_read_grows_over_all_files(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    files = find_text_files([str(tmp_path)])
    read = [block.read_bytes for block in read_blocks(files, block_bytes=4096)]
    assert read == sorted(read)
    assert read[-1] == 2 * len(LINES)


def test_every_mistake_is_told_at_once(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "table.csv").write_bytes(b"x")
    with pytest.raises(ConfigError) as caught:
        find_text_files([str(tmp_path / name) for name in ("missing.jsonl", "empty.jsonl", "table.csv")])
    told = [mistake.what for mistake in caught.value.mistakes]
    assert ["cannot read" in told[0], "empty" in told[1], "kind" in told[2]] == [True] * 3


def test_zst_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ConfigError, match="pip install zstandard"):
        content(tmp_path / "a.jsonl.zst")
