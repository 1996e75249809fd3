"""Token files that other projects' tools write are those written here, byte for byte, and train here as they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.data.corpora.python_stdlib import collect
from megatron.data.indexed.reader import IndexedDataset
from megatron.tokenizers import make_tokenizer
from megatron.tokenizers.trainer import save_tokenizer, train_byte_level_bpe
from tests.end_to_end.runs import run, series
from tests.packages import installed

pytestmark = pytest.mark.registry

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Texts, a tokenizer trained on them, our token files of both, and the losses of a run on those."""
    folder = tmp_path_factory.mktemp("work")
    texts = [document.text[:4000] for document in collect()[:60]] + ["naïve 東京 🙂\n"]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    save_tokenizer(train_byte_level_bpe(iter(texts), 400), folder / "t.json")
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", "a.jsonl", "--output-prefix", "ours"]
    command += ["--tokenizer-type", "HFTokenizer", "--vocab-file", "t.json", "--append-eod"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder, losses(folder, folder / "ours_text_document")


def losses(folder, prefix):
    """The losses of a short run, and of its validation."""
    records = run(
        1,
        folder / f"run_{prefix.name}",
        data_path=str(prefix),
        tokenizer_type="HFTokenizer",
        vocab_file=str(folder / "t.json"),
        train_iters=6,
        eval_interval=3,
    )
    found = series(records, "train/lm_loss"), series(records, "validation/lm_loss")
    assert [len(each) for each in found] == [6, 2]
    return found


def other(package, script, folder, *arguments):
    """Runs a script in a process that has a package."""
    environment = os.environ | {"PYTHONPATH": str(package), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", str(Path(__file__).with_name(script)), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def assert_same_and_trains(work, prefix):
    folder, expected = work
    for suffix in (".bin", ".idx"):
        assert Path(f"{prefix}{suffix}").read_bytes() == (folder / f"ours_text_document{suffix}").read_bytes()
    assert losses(folder, prefix) == expected


def test_datatrove(work):
    folder, _ = work
    package = installed("datatrove", "datatrove==0.10.1", "humanize==4.17.0", "loguru==0.7.3")
    other(package, "datatrove_side.py", folder, folder / "a.jsonl", folder / "t.json", folder)
    (made,) = folder.glob("*theirs*.idx")
    assert_same_and_trains(work, made.with_suffix(""))


def test_megatron_core(work):
    folder, _ = work
    tokenizer = make_tokenizer("HFTokenizer", vocab_file=str(folder / "t.json"))
    ours = IndexedDataset(folder / "ours_text_document")
    documents = {f"d{number:03}": ours[number] for number in range(len(ours))}
    np.savez(folder / "documents.npz", vocabulary=tokenizer.vocab_size, **documents)
    other(installed("megatron-core", "megatron-core"), "megatron_core_side.py", folder, "write", folder)
    assert_same_and_trains(work, folder / "theirs")
