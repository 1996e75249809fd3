"""prepare_data.py with the public names, against a server on this machine."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from megatron.data.corpora import catalog
from megatron.data.corpora.catalog import find_corpus
from megatron.data.corpora.download import DownloadSource
from megatron.data.corpora.public import PUBLIC_CORPORA
from megatron.data.indexed.reader import IndexedDataset
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.trainer import train_byte_level_bpe
from tests.data.test_download import serving
from tools.prepare_data import main

ROOT = Path(__file__).parents[2]
NAMES = [
    *("enron", "pile_subset", "pile", "github", "arxiv", "europarl", "freelaw", "nih", "pubmed", "books1", "books3"),
    *(
        "hackernews",
        "openwebtext2",
        "stackexchange",
        "ubuntu_irc",
        "youtube_subtitles",
        "c4",
        "c4_openwebtext",
        "enwik8",
    ),
]


def run(*arguments, cwd):
    command = [sys.executable, str(ROOT / "prepare_data.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=100)


def test_every_public_name_is_known():
    assert sorted(PUBLIC_CORPORA) == sorted(NAMES)
    for name in NAMES:
        corpus = find_corpus(name.upper())
        assert corpus.sources
        for source in corpus.sources:
            assert source.name == source.urls[0].rpartition("/")[2]
            assert all(url.startswith("http") for url in source.urls)
    assert [len(PUBLIC_CORPORA[name].sources) for name in ("pile", "c4", "c4_openwebtext")] == [30, 1024, 512]
    assert PUBLIC_CORPORA["pile_subset"].folder == "pile_00"


def test_pass_does_nothing(tmp_path):
    done = run("pass", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A vocabulary in GPT-2's two files."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = json.loads(train_byte_level_bpe(iter(["some words of text " * 30]), 300).to_str())["model"]
    (folder / "v.json").write_text(json.dumps(model["vocab"]))
    (folder / "m.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]))
    return ["-v", folder / "v.json", "-m", folder / "m.txt"], make_tokenizer(
        "GPT2BPETokenizer", vocab_file=str(folder / "v.json"), merge_file=str(folder / "m.txt")
    )


def test_fetched_and_tokenised(tmp_path, gpt2):
    """A transfer that breaks off, the default tokenizer, and the public file names; then nothing twice."""
    flags, tokenizer = gpt2
    texts = [f"Document {number} has some words. " * 50 for number in range(200)]
    with serving() as server:
        server.content = zstandard.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
        server.break_after = [100]
        done = run("pile_subset", "-d", "data", *flags, "--mirror", f"{server.url}/copy", "--workers", 2, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert server.asked == [("/copy/00.jsonl.zst", None), ("/copy/00.jsonl.zst", "bytes=100-")]
        data = IndexedDataset(tmp_path / "data/pile_00/pile_00_text_document")
        assert len(data) == 200
        assert data[7].tolist() == [*tokenizer.encode(texts[7]), tokenizer.eod]
        again = run("pile_subset", "-d", "data", *flags, "--mirror", server.url, cwd=tmp_path)
        assert again.returncode == 0
        assert "there already" in again.stdout
        forced = run(
            "pile_subset", "-d", "data", *flags, "--mirror", server.url, "-f", "-t", "CharLevelTokenizer", cwd=tmp_path
        )
        assert forced.returncode == 0, forced.stderr
        assert len(server.asked) == 3
    assert (
        IndexedDataset(tmp_path / "data/pile_00/pile_00_text_document")[7][:-1].tobytes().decode("utf-16") == texts[7]
    )


def test_a_killed_download_goes_on(tmp_path):
    """The server holds its answer back, so that the tool is killed in the middle of it."""
    with serving() as server:
        server.content = zstandard.compress(b'{"text": "words"}\n' + bytes(3_000_000))
        server.content += zstandard.compress(b'\n{"text": "more"}\n')
        held = threading.Event()
        full = server.content

        class Slow(bytes):
            def __getitem__(self, part):
                held.wait(20)
                return bytes.__getitem__(self, part)

        command = [
            sys.executable,
            str(ROOT / "prepare_data.py"),
            "nih",
            "-t",
            "CharLevelTokenizer",
            "--mirror",
            server.url,
        ]
        (tmp_path / "data/nih").mkdir(parents=True)
        part = tmp_path / "data/nih/NIH_ExPORTER_awarded_grant_text.jsonl.zst.part"
        part.write_bytes(full[:100])
        reported = {"url": f"{server.url}/NIH_ExPORTER_awarded_grant_text.jsonl.zst", "validator": '"1"'}
        part.with_name(part.name + ".json").write_text(json.dumps(reported))
        server.content = Slow(full)
        running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not server.asked and running.poll() is None:
            held.wait(0.05)
        running.kill()
        running.wait()
        held.set()
        server.content = full
        assert part.read_bytes() == full[:100]
        done = run("nih", "-t", "CharLevelTokenizer", "--mirror", server.url, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert server.asked[-1][1] == "bytes=100-"
    assert len(IndexedDataset(tmp_path / "data/nih/nih_text_document")) == 2
    assert "1 not JSON" in done.stdout


def test_a_source_that_is_gone(tmp_path, monkeypatch, capsys):
    with serving() as server:
        server.codes = [404, 404]
        source = DownloadSource("enron_emails.jsonl.zst", (f"{server.url}/enron_emails.jsonl.zst",))
        known = {"enron": replace(PUBLIC_CORPORA["enron"], sources=(source,))}
        monkeypatch.setattr(catalog, "PUBLIC_CORPORA", known)
        flags = ["enron", "-d", str(tmp_path), "-t", "CharLevelTokenizer"]
        assert main([*flags, "--mirror", f"{server.url}/copy/"]) == 1
    reported = capsys.readouterr().err
    assert f"{server.url}/copy/enron_emails.jsonl.zst: HTTP 404 Not Found; {server.url}/enron" in reported
    assert "put the file there yourself" in reported
    (tmp_path / "enron/enron_emails.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "words"}'))
    assert main(flags) == 0
    assert len(IndexedDataset(tmp_path / "enron/enron_text_document")) == 1


def test_a_file_that_is_not_the_published_one(tmp_path):
    with serving() as server:
        server.content = b"not a zip"
        done = run("enwik8", "-t", "CharLevelTokenizer", "--mirror", server.url, cwd=tmp_path)
        assert done.returncode == 1
        assert "no whole zip file with enwik8 in it" in done.stderr
        done = run("enwik8", "--mirror", server.url, cwd=tmp_path)
        assert done.returncode == 1
        assert "gpt2-vocab.json" in done.stderr
        assert "not the 196139668be6" in done.stderr
    assert not (tmp_path / "data/enwik8/enwik8.zip").exists()


def test_a_tokenizer_that_is_missing_is_reported_before_anything_is_fetched(tmp_path):
    with serving() as server:
        done = run("pile", "-t", "HFTokenizer", "--mirror", server.url, cwd=tmp_path)
        assert done.returncode == 2
        assert "HFTokenizer needs a tokenizer.json" in done.stderr
        assert server.asked == []
