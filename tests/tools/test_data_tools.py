"""The data tools from the shell: a corpus, a tokenizer on it, token files, and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.data.card import read_card
from megatron.data.indexed import IndexedDataset
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
    ("flags", "code", "told"),
    [
        (["--input", "missing.jsonl"], 2, "input = 'missing.jsonl': cannot read the file"),
        (["--vocab-file", "missing.json"], 2, "vocab_file = 'missing.json': cannot read"),
        (["--tokenizer-type", "HFTokeniser"], 2, "did you mean HFTokenizer"),
        (["--dataset-impl", "lazy"], 2, "dataset_impl = 'lazy'"),
        (["--jsonl-keys", "body"], 1, "50 without the key 'body'"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(work, tmp_path, flags, code, told):
    given = {
        "--input": "a.jsonl",
        "--output-prefix": str(tmp_path / "never"),
        "--tokenizer-type": "HFTokenizer",
        "--vocab-file": "t.json",
    } | dict(zip(flags[::2], flags[1::2], strict=True))
    done = run("tools/preprocess_data.py", *(part for pair in given.items() for part in pair), cwd=work)
    assert done.returncode == code
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


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
