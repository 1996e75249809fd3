"""Reading text files: every compression, blocks that lose nothing, and damage that is reported."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.preprocess.encode import Counted, records_of
from megatron.data.preprocess.reader import read_blocks
from megatron.data.preprocess.text_files import find_text_files
from megatron.errors import ConfigError

LINES = b"".join(json.dumps({"text": f"document {number} " * 9}).encode() + b"\n" for number in range(400))
COMPRESSED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def content(path, **settings):
    return b"".join(block.load() for block in read_blocks(find_text_files([str(path)]), **settings))


def documents(path, **settings):
    """What every document is, `file:number: text`, and what is reported of the rest."""
    found, reported = [], []
    for block in read_blocks(find_text_files([str(path)]), **settings):
        found += [
            (block.name.removeprefix(f"{path}!"), record.get("text"))
            for _, record in records_of(block, ("text",), reported, Counted())
        ]
    return found, [str(record) for record in reported]


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_every_compression(tmp_path, suffix):
    path = tmp_path / f"lines.jsonl{suffix}"
    path.write_bytes(COMPRESSED[suffix](LINES))
    assert content(path, block_bytes=1000) == LINES


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_that_was_cut_short(tmp_path, suffix):
    """Intact documents are read, and the damage is reported with its location."""
    path = tmp_path / f"lines.jsonl{suffix}"
    full = COMPRESSED[suffix](LINES)
    path.write_bytes(full[:-20])
    found, (reported,) = documents(path, block_bytes=1000)
    assert [text for _, text in found] == [json.loads(line)["text"] for line in LINES.splitlines()[: len(found)]]
    assert reported.startswith(f"{path}: damaged (it cannot be read on from byte ")
    assert f" of {len(full) - 20:,}: " in reported


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst", ""])
def test_a_file_that_is_not_what_its_name_says(tmp_path, suffix):
    path = tmp_path / (f"lines.jsonl{suffix}" if suffix else "lines.zip")
    path.write_bytes(LINES)
    found, (reported,) = documents(path)
    assert found == []
    assert "damaged" in reported


def test_a_frame_of_zstd_that_reaches_far_back(tmp_path):
    """Of `zstd --long=28`: a stream, so that the frame says its window and not its size."""
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    writer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    packed = writer.compress(b'{"text": "far back"}\n') + writer.flush()
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert content(tmp_path / "a.jsonl.zst") == b'{"text": "far back"}\n'


def test_a_file_of_several_compressed_frames(tmp_path):
    """Tools that compress in pieces write them one after another."""
    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        path = tmp_path / f"lines.jsonl{suffix}"
        path.write_bytes(COMPRESSED[suffix](LINES[:5000]) + COMPRESSED[suffix](LINES[5000:]))
        assert content(path, block_bytes=700) == LINES


MEMBERS = {
    "a/one.txt": b"one\ntwo",
    "a/lines.jsonl": b'{"text": "first"}\n{"text": "second"}\n',
    "readme": b"no ending",
    "notes.md": b"# notes",
    "more.jsonl.zst": zstandard.compress(b'{"text": "third"}'),
    "packed.txt.gz": gzip.compress(b"packed"),
    "old.dat.zst": zstandard.compress(b"0000000000000004abcd0000000000000000" + b"0000000000000002" + "é".encode()),
}
INSIDE = [
    ("a/one.txt", "one\ntwo"),
    ("a/lines.jsonl", "first"),
    ("a/lines.jsonl", "second"),
    ("readme", "no ending"),
    ("notes.md", "# notes"),
    ("more.jsonl.zst", "third"),
    ("packed.txt.gz", "packed"),
    ("old.dat.zst", "abcd"),
    ("old.dat.zst", ""),
    ("old.dat.zst", "é"),
]


def tar(members):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, held in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(held)
            archive.addfile(member, io.BytesIO(held))
    return made.getvalue()


def zipped(members):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("a")
        for name, held in members.items():
            archive.writestr(name, held)
    return made.getvalue()


@pytest.mark.parametrize(
    "name", ["x.tar", "x.tar.gz", "x.tgz", "x.tar.bz2", "x.tar.xz", "x.tar.zst", "x.jsonl.zst.tar"]
)
def test_members_of_a_tar_in_its_order(tmp_path, name):
    suffix = {"x.tgz": ".gz", "x.jsonl.zst.tar": ".tar"}.get(name, (tmp_path / name).suffix)
    (tmp_path / name).write_bytes(COMPRESSED["" if suffix == ".tar" else suffix](tar(MEMBERS)))
    assert documents(tmp_path / name) == (INSIDE, [])


def test_members_of_a_zip(tmp_path):
    (tmp_path / "x.zip").write_bytes(zipped(MEMBERS))
    assert documents(tmp_path / "x.zip") == (INSIDE, [])


@pytest.mark.parametrize(("name", "packed"), [("x.tar", tar), ("x.zip", zipped)])
def test_members_that_are_no_text_are_reported(tmp_path, name, packed):
    members = {"b.txt": b"b", "picture.png": b"\x89PNG", "inner.zip": zipped({"a.txt": b"a"}), "__MACOSX/._b.txt": b"x"}
    (tmp_path / name).write_bytes(packed(members | {"c.txt": b"\xff"}))
    found, reported = documents(tmp_path / name)
    assert found == [("b.txt", "b")]
    assert [line.removeprefix(f"{tmp_path / name}!").split(" (")[0] for line in reported] == [
        "picture.png: not read",
        "inner.zip: not read",
        "c.txt: not UTF-8",
    ]


@pytest.mark.parametrize(("name", "packed"), [("x.tar", tar), ("x.zip", zipped)])
def test_an_archive_that_was_cut_short(tmp_path, name, packed):
    full = packed({"a.txt": b"a" * 2000, "b.txt": bytes(range(32, 127)) * 400})
    (tmp_path / name).write_bytes(full[: len(full) // 2])
    found, reported = documents(tmp_path / name)
    assert len(found) == (1 if name == "x.tar" else 0)  # a zip has its list of members at its end
    assert "damaged" in reported[-1]


def test_a_member_whose_checksum_is_wrong(tmp_path):
    full = zipped({"a.txt": b"first", "b.txt": bytes(range(32, 127)) * 40})
    position = full.index(b"b.txt") + 60
    (tmp_path / "x.zip").write_bytes(full[:position] + bytes([full[position] ^ 1]) + full[position + 1 :])
    found, (reported,) = documents(tmp_path / "x.zip")
    assert found == [("a.txt", "first")]
    assert "damaged" in reported


@pytest.mark.parametrize(
    ("held", "reported"),
    [
        (b"0000000000000002ab00000000000000", "document 2 does not start with its length"),
        (b"0000000000000002abgarbage, no length", "document 2 does not start with its length"),
        (b"0000000000000002ab9999999999999999cd", "document 2 should have 9,999,999,999,999,999 bytes and has 2"),
    ],
)
def test_damage_in_an_archive_of_lengths(tmp_path, held, reported):
    (tmp_path / "x.dat.zst").write_bytes(zstandard.compress(held))
    found, (line,) = documents(tmp_path / "x.dat.zst")
    assert [text for _, text in found] == ["ab"]
    assert reported in line


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(
        ["x.tar", "x.zip", "x.dat", "x.jsonl", "x.jsonl.zst", "x.jsonl.gz", "x.jsonl.xz", "x.jsonl.bz2"]
    ),
    data=st.data(),
)
def test_no_damage_crashes_the_reader(tmp_path_factory, name, data):
    """Bytes changed, cut or put in anywhere: documents or a reported error come of it, nothing else."""
    suffix = name.removeprefix("x.jsonl")
    lines = LINES[:600]
    full = {"x.tar": tar(MEMBERS), "x.zip": zipped(MEMBERS), "x.dat": b"0000000000000004abcd" * 3}.get(name)
    made = bytearray(COMPRESSED[suffix](lines) if full is None else full)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(made)))
        made[position : position + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path = tmp_path_factory.mktemp("text") / name
    path.write_bytes(bytes(made) or b"x")
    found, reported = documents(path, block_bytes=100)
    assert all(isinstance(text, str | int | None | list | dict | float) for _, text in found)
    assert all(str(path) in line for line in reported)


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=20),
    size=st.integers(1, 50),
)
def test_blocks_are_full_lines_and_lose_nothing(tmp_path_factory, lines, size):
    path = tmp_path_factory.mktemp("text") / "lines.jsonl"
    full = b"\n".join(lines) or b"x"
    path.write_bytes(full)
    blocks = list(read_blocks(find_text_files([str(path)]), block_bytes=size))
    assert b"".join(block.load() for block in blocks) == full.removeprefix(b"\xef\xbb\xbf")
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


def test_a_directory_is_for_its_text_files(tmp_path):
    hidden = (".ipynb_checkpoints/b-checkpoint.jsonl", "._b.jsonl", ".b.jsonl.swp.jsonl", "below/.cache/c.parquet")
    for name in ("b.jsonl", "a.txt", "picture.png", "below/c.jsonl.xz", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
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


def test_every_issue_is_reported_at_once(tmp_path):
    (tmp_path / "table.csv").write_bytes(b"x")
    with pytest.raises(ConfigError) as caught:
        find_text_files([str(tmp_path / name) for name in ("missing.jsonl", "table.csv")])
    reported = [issue.message for issue in caught.value.issues]
    assert ["cannot read" in reported[0], "kind" in reported[1]] == [True] * 2


def test_zst_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ConfigError, match="pip install zstandard"):
        content(tmp_path / "a.jsonl.zst")
