"""The data tools from the shell: a corpus, a tokenizer on it, token files, and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.data.indexed.metadata import read_card
from megatron.data.indexed.reader import IndexedDataset
from megatron.tokenizers import make_tokenizer

ROOT = Path(__file__).parents[2]


def run(tool, *arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / tool), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a small text, a tokenizer trained on it, and its token files: all through the tools."""
    folder = tmp_path_factory.mktemp("work")
    records = [{"text": f"This is document number {number}.\nIt has two lines."} for number in range(50)]
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    trained = run(
        "tools/train_tokenizer.py", "--input", "a.jsonl", "--tokenizer_output_path", "t.json", "-v", 300, cwd=folder
    )
    assert trained.returncode == 0, trained.stderr
    assert "t.json: 300 tokens" in trained.stdout
    # --vocab is a public abbreviation of --vocab-file.
    flags = ("--input", "a.jsonl", "--output-prefix", "out/a", "--tokenizer-type", "HFTokenizer", "--vocab", "t.json")
    done = run("tools/preprocess_data.py", *flags, "--append-eod", "--workers", 2, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "out/a_text_document.bin and .idx: 50 documents" in done.stdout
    return folder


def test_token_files_hold_the_text(work):
    tokenizer = make_tokenizer("HFTokenizer", vocab_file=str(work / "t.json"))
    data = IndexedDataset(work / "out/a_text_document")
    assert len(data) == 50
    assert data[7][-1] == tokenizer.eod == 0
    assert tokenizer.decode(data[7].tolist()) == "This is document number 7.\nIt has two lines."
    card = read_card(work / "out/a_text_document", documents=50, tokens=len(data.tokens))
    assert (card.tokenizer_type, card.vocab_size, card.eod) == ("HFTokenizer", 300, 0)


@pytest.mark.parametrize(
    ("flags", "code", "reported"),
    [
        (["--input", "missing.jsonl"], 2, "input = 'missing.jsonl': cannot read the file"),
        (["--vocab-file", "missing.json"], 2, "vocab_file = 'missing.json': cannot read"),
        (["--tokenizer-type", "HFTokeniser"], 2, "did you mean HFTokenizer"),
        (["--jsonl-keys", "body"], 1, "50 without the key 'body'"),
    ],
)
def test_issues_are_one_line_and_an_exit_code(work, tmp_path, flags, code, reported):
    given = {
        "--input": "a.jsonl",
        "--output-prefix": str(tmp_path / "never"),
        "--tokenizer-type": "HFTokenizer",
        "--vocab-file": "t.json",
    } | dict(zip(flags[::2], flags[1::2], strict=True))
    done = run("tools/preprocess_data.py", *(part for pair in given.items() for part in pair), cwd=work)
    assert done.returncode == code
    assert reported in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("impl", ["lazy", "cached"])
def test_the_legacy_format(work, tmp_path, impl):
    flags = ("--input", "a.jsonl", "--output-prefix", tmp_path / "p", "--dataset-impl", impl)
    done = run("tools/preprocess_data.py", *flags, "--tokenizer-type", "CharLevelTokenizer", cwd=work)
    assert done.returncode == 0, done.stderr
    data = IndexedDataset(tmp_path / "p_text_document")
    assert (data.legacy, len(data), data.dtype.name) == (True, 50, "int32")
    inspected = run("tools/inspect_dataset.py", tmp_path / "p_text_document", "--check", cwd=work)
    assert "legacy format, version 1" in inspected.stdout


def test_a_tokenizer_needs_text(work):
    done = run(
        "tools/train_tokenizer.py",
        "--input",
        "a.jsonl",
        "--jsonl-key",
        "body",
        "--tokenizer-output-path",
        "n",
        cwd=work,
    )
    assert done.returncode == 1
    assert "no text" in done.stderr
    assert not (work / "n").exists()


def test_a_corpus_by_name(tmp_path):
    made = run(
        "prepare_data.py", "python_stdlib", "-d", "data", "-t", "CharLevelTokenizer", "--workers", 1, cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "data/python_stdlib"
    about = json.loads((folder / "about.json").read_text())
    valid = IndexedDataset(folder / "valid_text_document")
    assert len(valid) == about["valid_documents"]
    assert len(valid.tokens) == about["valid_bytes"] + about["valid_documents"]
    before = (folder / "train.jsonl").stat().st_mtime_ns
    again = run("prepare_data.py", "python_stdlib", "-d", "data", cwd=tmp_path)
    assert again.returncode == 0
    assert "already" in again.stdout
    assert (folder / "train.jsonl").stat().st_mtime_ns == before


def test_an_unknown_corpus(tmp_path):
    done = run("prepare_data.py", "python_stdlb", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean python_stdlib?" in done.stderr


def test_shards_merged_inspected_and_counted(work, tmp_path):
    flags = ("--input", "a.jsonl", "--tokenizer-type", "HFTokenizer", "--vocab-file", "t.json", "--append-eod")
    for number in range(3):
        done = run(
            "tools/preprocess_data.py", *flags, "--output_prefix", tmp_path / "s/p", "--shard", f"{number}/3", cwd=work
        )
        assert done.returncode == 0, done.stderr
    merged = run("tools/merge_datasets.py", "--input", tmp_path / "s", "--output-prefix", tmp_path / "all", cwd=work)
    assert merged.returncode == 0, merged.stderr
    assert "50 documents" in merged.stdout
    for suffix in (".bin", ".idx", ".json"):
        assert Path(f"{tmp_path}/all{suffix}").read_bytes() == (work / f"out/a_text_document{suffix}").read_bytes()
    counted = run("tools/count_tokens.py", tmp_path / "s", tmp_path / "all", cwd=work)
    assert counted.stdout.splitlines()[-1].startswith("together: 100 documents")
    inspected = run(
        *("tools/inspect_dataset.py", tmp_path / "all", "--check", "--document", 7, "--histogram", 3),
        *("--tokenizer-type", "HFTokenizer", "--vocab-file", "t.json"),
        cwd=work,
    )
    assert inspected.returncode == 0, inspected.stderr
    assert "This is document number 7.\nIt has two lines." in inspected.stdout
    assert "documents: 50" in inspected.stdout
    assert "intact" in inspected.stdout
    damaged = bytearray((tmp_path / "all.idx").read_bytes())
    damaged[34 + 50 * 4 + 8] ^= 1
    (tmp_path / "all.idx").write_bytes(damaged)
    assert "does not start" in run("tools/inspect_dataset.py", tmp_path / "all", "--check", cwd=work).stderr


def test_a_sentencepiece_model(work):
    flags = ("--input", "a.jsonl", "--tokenizer-output-path", "s.model", "--tokenizer-type", "unigram", "-v", 320)
    trained = run("tools/train_tokenizer.py", *flags, cwd=work)
    assert trained.returncode == 0, trained.stderr
    tokenizer = make_tokenizer("SPMTokenizer", vocab_file=str(work / "s.model"))
    assert tokenizer.eod == 3
    assert tokenizer.decode(tokenizer.encode("  two  spaces\n")) == "  two  spaces\n"


def test_flags_of_other_projects(work, tmp_path):
    flags = ("--input", "a.jsonl", "--output-prefix", tmp_path / "p", "--json-keys", "text", "--split-sentences")
    done = run("tools/preprocess_data.py", *flags, "--tokenizer-type", "CharLevelTokenizer", "--append-eod", cwd=work)
    assert done.returncode == 0, done.stderr
    data = IndexedDataset(tmp_path / "p_text_sentence")
    assert (len(data), len(data.document_index)) == (100, 51)
    assert bytes(data[0].astype("u1")) == b"This is document number 0."
    assert bytes(data[1].astype("u1")) == b"It has two lines.\x00"
