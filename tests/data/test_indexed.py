"""The token files: bytes, round trip, and damage that must be seen."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.indexed.reader import IndexedDataset, dtype_for_vocabulary
from megatron.data.indexed.writer import DatasetWriter
from megatron.errors import ConfigError, RunError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


def write(prefix, documents=DOCUMENTS, dtype="<u2"):
    with DatasetWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


@pytest.fixture
def prefix(tmp_path):
    return write(tmp_path / "made_text_document")


def test_bytes_on_disk(prefix):
    """Written out by hand from the description of the format."""
    assert prefix.with_suffix(".bin").read_bytes() == struct.pack("<8H", 5, 6, 7, 8, 9, 10, 11, 12)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    arrays = struct.pack("<3i", 3, 1, 4) + struct.pack("<3q", 0, 6, 8) + struct.pack("<4q", 0, 1, 2, 3)
    assert prefix.with_suffix(".idx").read_bytes() == header + arrays


def test_only_the_pair_is_left(prefix):
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["made_text_document.bin", "made_text_document.idx"]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 200), max_size=20), max_size=12),
    dtype=st.sampled_from(["<u1", "<u2", "<i4", "<i8"]),
)
def test_round_trip(tmp_path_factory, documents, dtype):
    data = IndexedDataset(write(tmp_path_factory.mktemp("data") / "p", documents, dtype))
    data.check()
    assert len(data) == len(documents)
    assert [data[item].tolist() for item in range(len(data))] == documents
    assert data.document_index.tolist() == list(range(len(documents) + 1))
    assert data.tokens.tolist() == [token for document in documents for token in document]


def test_parts_of_a_document(prefix):
    data = IndexedDataset(prefix)
    assert data.get(2, 1, 2).tolist() == [10, 11]
    with pytest.raises(IndexError):
        data.get(0, 2, 2)


def test_another_process_opens_it_again(prefix):
    assert pickle.loads(pickle.dumps(IndexedDataset(prefix)))[2].tolist() == [9, 10, 11, 12]


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(512, "uint16"), (65499, "uint16"), (65500, "int32"), (100_000, "int32")]
)
def test_dtype_follows_the_vocabulary(vocabulary, dtype):
    assert dtype_for_vocabulary(vocabulary).name == dtype


@pytest.mark.parametrize("token", [65536, -1])
def test_ids_beyond_the_dtype_are_refused(tmp_path, token):
    with pytest.raises(RunError, match=f"token id {token}"):
        write(tmp_path / "p", [[1, 2], [token]])
    assert list(tmp_path.iterdir()) == []


def test_a_error_while_writing_leaves_the_older_pair(prefix):
    before = prefix.with_suffix(".bin").read_bytes()
    with pytest.raises(RunError, match="does not fit"), DatasetWriter(prefix, np.dtype("<u2")) as writer:
        writer.add_documents(np.array([1, 70000]), np.array([1, 1]))
    assert prefix.with_suffix(".bin").read_bytes() == before
    assert len(IndexedDataset(prefix)) == 3


def test_new_tokens_never_stand_beside_an_older_index(prefix, monkeypatch):
    """Both pairs have as many bytes, so no later check could tell."""
    replace = os.replace

    def killed_before_the_index(source, target):
        if str(target).endswith(".idx"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_before_the_index)
    with pytest.raises(KeyboardInterrupt):
        write(prefix, [[1, 2, 3, 4], [5, 6, 7, 8]])
    with pytest.raises(ConfigError, match="cannot read"):
        IndexedDataset(prefix)


def test_two_writers_of_one_pair(tmp_path):
    with DatasetWriter(tmp_path / "p", np.dtype("<u2")) as first:
        first.add_document([1])
        with pytest.raises(RunError, match="another process"):
            DatasetWriter(tmp_path / "p", np.dtype("<u2"))
    assert IndexedDataset(tmp_path / "p")[0].tolist() == [1]


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    """/dev/full answers every write as a full disk does."""
    monkeypatch.setattr(DatasetWriter, "_open", lambda self, path: Path("/dev/full").open("wb", buffering=0))  # noqa: SIM115
    with pytest.raises(RunError, match="No space left"), DatasetWriter(tmp_path / "p", np.dtype("<u2")) as writer:
        writer.add_document([1, 2, 3])
    assert list(tmp_path.iterdir()) == []


def test_missing_files_name_the_key(tmp_path):
    with pytest.raises(ConfigError, match="data_path = "):
        IndexedDataset(tmp_path / "nowhere", key="data_path")


@pytest.mark.parametrize("cut", [1, 7, 15])
def test_a_truncated_bin(prefix, cut):
    path = prefix.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(RunError, match="cut short"):
        IndexedDataset(prefix)


def test_an_idx_of_other_data(prefix, tmp_path):
    write(tmp_path / "other", [[1] * 5, [2] * 5])
    (tmp_path / "other.idx").rename(prefix.with_suffix(".idx"))
    with pytest.raises(RunError, match="do not belong together"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("length", [9, 20, 33, 34, 50, 77])
def test_a_truncated_idx(prefix, length):
    path = prefix.with_suffix(".idx")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(RunError, match=r"should have|header"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("at", "patch", "error", "reported"),
    [
        (0, b"XXXXXXXXX", ConfigError, "not an index"),
        (0, b"TNTIDX\0\0", RunError, "header has 56 bytes|version|dtype code|bytes a token|should have"),
        (9, struct.pack("<Q", 2), RunError, "version 2"),
        (17, b"\x09", RunError, "dtype code 9"),
        (18, struct.pack("<Q", 2**62), RunError, "should have"),
    ],
)
def test_a_changed_header(prefix, at, patch, error, reported):
    path = prefix.with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[at : at + len(patch)] = patch
    path.write_bytes(content)
    with pytest.raises(error, match=reported):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("at", "patch", "reported"),
    [
        (34, struct.pack("<i", -3), "negative length"),
        (38, struct.pack("<i", 2), "document 2 does not start"),
        (46, struct.pack("<q", 2), "byte 0"),
    ],
)
def test_check_reads_the_full_index(prefix, at, patch, reported):
    path = prefix.with_suffix(".idx")
    content = bytearray(path.read_bytes())
    content[at : at + len(patch)] = patch
    path.write_bytes(content)
    with pytest.raises(RunError, match=reported):
        IndexedDataset(prefix).check()


def write_legacy(prefix):
    with DatasetWriter(prefix, np.dtype("<i4"), legacy=True) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    return prefix


def test_the_legacy_format_on_disk(tmp_path):
    """Written out by hand from the description of the format, and read again."""
    prefix = write_legacy(tmp_path / "p")
    assert prefix.with_suffix(".bin").read_bytes() == struct.pack("<8i", 5, 6, 7, 8, 9, 10, 11, 12)
    header = b"TNTIDX\x00\x00" + struct.pack("<6Q", 1, 4, 4, 3, 3, 4)
    arrays = struct.pack("<4q", 0, 1, 2, 3) + struct.pack("<4q", 0, 3, 4, 8) + struct.pack("<3q", 3, 1, 4)
    assert prefix.with_suffix(".idx").read_bytes() == header + arrays + struct.pack("<4q", 0, 1, 2, 3)
    data = IndexedDataset(prefix)
    data.check()
    assert data.legacy
    assert [data[item].tolist() for item in range(3)] == DOCUMENTS
    assert (data.sizes.dtype, data.starts.tolist(), data.document_index.tolist()) == (
        np.int32,
        [0, 12, 16],
        [0, 1, 2, 3],
    )


def damaged(content, data):
    """Bytes changed, cut off or put in anywhere."""
    made = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(made)))
        made[position : position + data.draw(st.integers(0, 8))] = data.draw(
            st.one_of(
                st.binary(max_size=8), st.sampled_from([b"\xff" * 8, b"\x7f" * 8, bytes(8), b"\x00" * 7 + b"\x80"])
            )
        )
    return bytes(made)


@settings(max_examples=500, deadline=None)
@given(legacy=st.booleans(), part=st.sampled_from([".idx", ".bin"]), data=st.data())
def test_no_damage_crashes_the_reader(tmp_path_factory, legacy, part, data):
    """An error in words, or a data set all of whose documents can be read."""
    folder = tmp_path_factory.mktemp("data")
    prefix = write_legacy(folder / "p") if legacy else write(folder / "p")
    path = prefix.with_suffix(part)
    path.write_bytes(damaged(path.read_bytes(), data))
    reported = None
    try:
        found = IndexedDataset(prefix)
        found.check()
    except (ConfigError, RunError) as error:
        reported = str(error)
    if reported is not None:
        assert str(prefix) in reported
        return
    assert sum(len(found[item]) for item in range(len(found))) == len(found.tokens)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200), with_magic=st.booleans())
def test_no_bytes_crash_the_reader(tmp_path_factory, content, with_magic):
    prefix = write(tmp_path_factory.mktemp("data") / "p")
    prefix.with_suffix(".idx").write_bytes((b"MMIDIDX\0\0\x01" + bytes(7) if with_magic else b"") + content)
    with pytest.raises((ConfigError, RunError)):
        IndexedDataset(prefix).check()
