"""Damaged compressed files and archives: everything that is intact before the damage is read, and the damage is
reported.
"""

import bz2
import gzip
import io
import itertools
import json
import lzma
import tarfile
import zlib

import numpy as np
import pytest
import zstandard

from megatron.data.preprocess.reader import parse_lengths, read_blocks
from megatron.data.preprocess.text_files import find_text_files


def _records(count=1200):
    """Lines of 700 random letters: 20 % of them compressed hold several hundred whole ones, in less than 1 MiB."""
    generator = np.random.default_rng(1)
    return [
        json.dumps({"text": bytes(generator.choice(list(b"abcdefgh "), 700).tolist()).decode()}) for _ in range(count)
    ]


def _available(suffix, content):
    """What the bytes give when they are handed to a decompressor all at once; what it raises at the end is left out."""
    if not suffix:
        return content
    makers = {
        ".gz": lambda: zlib.decompressobj(31),
        ".bz2": bz2.BZ2Decompressor,
        ".xz": lzma.LZMADecompressor,
        ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    }
    return makers[suffix]().decompress(content)


PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": lambda content: bz2.compress(content, 1),
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".zst": zstandard.ZstdCompressor(level=3, write_checksum=True).compress,
}
PACKED = [suffix for suffix in PACK if suffix]
DAMAGES = {
    "cut at 20 %": lambda content: content[: len(content) // 5],
    "cut at 90 %": lambda content: content[: len(content) * 9 // 10],
    "cut by a byte": lambda content: content[:-1],
    "junk behind it": lambda content: content + b"no archive" * 3,
}


@pytest.fixture(scope="module")
def records():
    return _records()


@pytest.mark.parametrize(("suffix", "archive"), [*itertools.product(PACK, [True]), *itertools.product(PACKED, [False])])
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_full_line_before_damage_is_retained(tmp_path, records, suffix, damage, archive):
    text = "".join(record + "\n" for record in records).encode()
    content = text
    if archive:
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as tar:
            about = tarfile.TarInfo("lines.jsonl")
            about.size = len(text)
            tar.addfile(about, io.BytesIO(text))
        content = made.getvalue()
    damaged = DAMAGES[damage](PACK[suffix](content))
    path = tmp_path / (f"lines.tar{suffix}" if archive else f"lines.jsonl{suffix}")
    path.write_bytes(damaged)
    full = _available(suffix, damaged)[512 if archive else 0 :][: len(text)].count(b"\n")
    assert full > 100, "several lines, in less than a block, or all of them"
    blocks = list(read_blocks([*find_text_files([str(path)])]))
    assert b"".join(block.content for block in blocks if block.lost is None) == b"".join(
        record.encode() + b"\n" for record in records[:full]
    )
    reported = [block.lost[0] for block in blocks if block.lost is not None]
    assert reported == ["damaged"] or (  # what follows the end of a tar is not read
        archive and reported == [] and full == len(records) and damage in ("cut by a byte", "junk behind it")
    )


STREAMS = {
    ".bz2": (bz2.compress, b""),
    ".xz": (lzma.compress, b""),
    ".bz2, padded": (bz2.compress, b"\0" * 512),
    ".xz, padded": (lzma.compress, b"\0" * 4),
    ".xz, padded over blocks": (lzma.compress, b"\0" * (1 << 18)),
}


@pytest.mark.parametrize("case", STREAMS)
def test_streams_one_after_another_are_all_read(tmp_path, case):
    compress, padding = STREAMS[case]
    lines = [json.dumps({"text": name}).encode() + b"\n" for name in ("one", "two", "three")]
    path = tmp_path / f"lines.jsonl{case.partition(',')[0]}"
    path.write_bytes(b"".join(compress(line) + padding for line in lines))
    blocks = list(read_blocks(find_text_files([str(path)])))
    assert b"".join(block.content for block in blocks) == b"".join(lines)
    assert [block.lost for block in blocks if block.lost is not None] == []


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
def test_a_damaged_start_of_a_later_stream_is_reported(tmp_path, suffix):
    first, second = (PACK[suffix](json.dumps({"text": name}).encode() + b"\n") for name in ("one", "two"))
    path = tmp_path / f"lines.jsonl{suffix}"
    path.write_bytes(first + bytes([second[0] ^ 1]) + second[1:])
    blocks = list(read_blocks(find_text_files([str(path)])))
    assert b"".join(block.content for block in blocks if block.lost is None) == b'{"text": "one"}\n'
    assert [block.lost[0] for block in blocks if block.lost is not None] == ["damaged"]


@pytest.mark.parametrize("suffix", PACKED)
def test_documents_of_a_dat_before_damage_are_retained(tmp_path, suffix):
    texts = [bytes(np.random.default_rng(number).choice(list(b"abcdefgh "), 900).tolist()) for number in range(600)]
    content = b"".join(f"{len(text):016}".encode() + text for text in texts)
    damaged = PACK[suffix](content)[: -len(content) // 20]
    path = tmp_path / f"some.dat{suffix}"
    path.write_bytes(damaged)
    full = len(_available(suffix, damaged)) // 916
    blocks = list(read_blocks(find_text_files([str(path)])))
    retained = [text for block in blocks if block.lost is None for text in parse_lengths(block.content)]
    assert retained == texts[:full]
    assert blocks[-1].lost[0] == "damaged"


def test_a_last_line_without_its_end_is_retained_before_junk_and_not_where_it_was_cut(tmp_path):
    """The compressed file is whole; what is behind it is not. A line that was cut is no JSON object."""
    text = b'{"text": "a"}\n{"text": "b"}'
    for name, content, retained in (
        ("junk.jsonl.gz", gzip.compress(text) + b"junk", text),
        ("cut.jsonl.gz", gzip.compress(text[:-1])[:-1], text[:14]),
    ):
        (tmp_path / name).write_bytes(content)
        blocks = list(read_blocks(find_text_files([str(tmp_path / name)])))
        assert b"".join(block.content for block in blocks if block.lost is None) == retained
        assert blocks[-1].lost[0] == "damaged"


@pytest.mark.parametrize("retained", range(0, 1400, 97))
def test_a_member_that_is_cut_anywhere_is_reported(tmp_path, retained):
    """A tar of a text and of lines, both shorter than what is read at once: the text counts whole or not at all."""
    text, lines = b"words " * 40, b'{"text": "a"}\n' * 12
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in (("a.txt", text), ("b.jsonl", lines)):
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    path = tmp_path / "x.tar"
    path.write_bytes(made.getvalue()[:retained])
    blocks = list(read_blocks(find_text_files([str(path)])))
    found = b"".join(block.content for block in blocks if block.lost is None)
    full = (text if retained >= 512 + len(text) else b"") + lines[: max(0, (retained - 1536) // 14 * 14)]
    assert found == full
    reported = [block.lost[0] for block in blocks if block.lost is not None]
    assert reported == (["damaged"] if retained else ["empty"])
