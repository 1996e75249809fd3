"""Input that is no JSON lines, holds nothing, or is of a kind that is not read: what the tool says of it."""

import gzip
import io
import json
import tarfile
import zipfile

import pytest

from megatron.data.indexed.reader import IndexedDataset
from tools.preprocess_data import main

ROWS = [{"text": f"number {number}", "id": number} for number in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def tokenized(path, out, *more):
    """The exit code of the tool."""
    arguments = ["--input", str(path), "--output-prefix", str(out), "--tokenizer-type", "CharLevelTokenizer", *more]
    return main(arguments)


@pytest.mark.parametrize(
    ("name", "content", "reason", "hint"),
    [
        ("array.json", json.dumps(ROWS), "not a JSON object", "makes such lines of a JSON array"),
        ("array.jsonl", json.dumps(ROWS, indent=1), "not JSON", "one JSON object a line is read"),
        ("pretty.json", "\n".join(json.dumps(row, indent=2) for row in ROWS), "not JSON", "objects that span several"),
        ("texts.jsonl", '"a"\n"b"\n', "not a JSON object (it is a text)", "one JSON object a line is read"),
        ("plain.jsonl", "just words\n" * 3, "not JSON", "one JSON object a line is read"),
        ("utf16.jsonl", LINES.encode("utf-16"), "it is UTF-16", "iconv -t UTF-8"),
        ("utf16be.jsonl", LINES.encode("utf-16-be"), "it is UTF-16", "iconv -t UTF-8"),
        ("latin.jsonl", LINES.replace("number", "\xfcber").encode("latin-1"), "not UTF-8", "make it UTF-8"),
        ("damaged.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:12], "damaged", "fetch the file again"),
        ("no_gzip.jsonl.gz", LINES, "damaged", "fetch the file again"),
        ("keys.jsonl", LINES.replace("text", "body"), "without the key 'text'", "--jsonl-keys"),
        ("numbers.jsonl", '{"text": 5}\n', "whose 'text' is not text", "--jsonl-keys"),
        ("empty.jsonl", "", "empty (it holds nothing)", "name files that hold text"),
    ],
)
def test_the_hint_fits_what_is_wrong(tmp_path, capsys, name, content, reason, hint):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert tokenized(path, tmp_path / "out") == 1
    reported = capsys.readouterr().err
    assert reason in reported
    assert hint in reported
    assert ("--jsonl-keys" in reported) == ("jsonl-keys" in hint)


def archive(kind):
    made = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=made, mode="w") as tar:
            for name, content in (("a.jsonl", b""), ("b.jsonl", LINES.encode())):
                about = tarfile.TarInfo(name)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    else:
        with zipfile.ZipFile(made, "w") as packed:
            packed.writestr("a.jsonl", "")
            packed.writestr("b.jsonl", LINES)
    return made.getvalue()


EMPTY = {
    "a.jsonl": b"",
    "a.dat": b"",
    "a.jsonl.gz": gzip.compress(b""),
    "b.jsonl.gz": b"",
    "a.tar": archive("tar"),
    "a.zip": archive("zip"),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_shard_is_counted_and_no_more(tmp_path, capsys, name, workers, strict):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(EMPTY[name])
    (folder / "z.jsonl").write_text(LINES)
    more = ["--workers", workers, *(["--strict"] if strict else [])]
    assert tokenized(folder, tmp_path / "out", *more) == 0
    documents = 10 if name in ("a.tar", "a.zip") else 5
    assert len(IndexedDataset(tmp_path / "out_text_document")) == documents
    reported = capsys.readouterr().out
    assert "1 lines or files skipped: 1 empty" in reported
    assert name in (tmp_path / "out_skipped.jsonl").read_text()


def test_an_empty_shard_is_counted_once_on_several_machines(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in (("a", LINES), ("b", ""), ("c", LINES), ("d", "")):
        (folder / f"{name}.jsonl").write_text(content)
    for number in range(3):
        assert tokenized(folder, tmp_path / "out", "--shard", f"{number}/3") == 0
    reported = [path.read_text() for path in sorted(tmp_path.glob("out-*_skipped.jsonl"))]
    assert ["b.jsonl" in each for each in reported].count(True) == 1
    assert ["d.jsonl" in each for each in reported].count(True) == 1


@pytest.mark.parametrize("name", ["a.parquet", "below/b.arrow", "c.csv", "d.csv.gz", "e.jsonl.lz4", "F.PARQUET"])
@pytest.mark.parametrize("beside", [True, False])
def test_a_folder_with_data_that_is_not_read_is_refused(tmp_path, capsys, name, beside):
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PAR1")
    if beside:
        (tmp_path / "in" / "z.jsonl").write_text(LINES)
    assert tokenized(tmp_path / "in", tmp_path / "out") == 2
    reported = capsys.readouterr().err
    assert f"1 files of kinds that are not read: {path}" in reported
    assert not list(tmp_path.glob("out*"))


def test_a_folder_with_other_files_is_read(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("README.md", "picture.png", "LICENSE", "sums.sha256"):
        (folder / name).write_text("x")
    (folder / "z.jsonl").write_text(LINES)
    assert tokenized(folder, tmp_path / "out") == 0
