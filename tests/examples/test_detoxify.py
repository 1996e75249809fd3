"""examples/detoxify, whole, at small size: a model that was trained on a listed word writes it less often."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.runs import BASE, run
from tests.examples.scripts import EXAMPLES
from tests.examples.scripts import run as run_script
from tools import preprocess_data

WORDS, LISTED, DOCUMENTS = ("red", "fox", "day", "sun", "run"), "zog", 600


def write_documents(path: Path) -> None:
    """Lines of a few words, half of them with the listed word."""
    draw = random.Random(0)
    lines = []
    for number in range(DOCUMENTS):
        words = draw.choices(WORDS, k=6)
        if number % 2:
            words[draw.randrange(6)] = LISTED
        lines.append(json.dumps({"text": " ".join(words)}))
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.long
def test_the_listed_word_is_rarer_after(tmp_path: Path) -> None:
    write_documents(tmp_path / "text.jsonl")
    flags = ["--tokenizer-type=CharLevelTokenizer", "--append-eod", f"--output-prefix={tmp_path / 'text'}"]
    preprocess_data.main([f"--input={tmp_path / 'text.jsonl'}", *flags])
    model = {**BASE, "seq_length": 32, "max_position_embeddings": 32, "tokenizer_type": "CharLevelTokenizer"}
    model |= {"optimizer": {"type": "Adam", "params": {"lr": 0.003}}, "train_batch_size": 16, "eval_iters": 0}
    data = str(tmp_path / "text_text_document")
    saved = {"data_path": data, "save": str(tmp_path / "save"), "checkpoint_factor": 300}
    run(1, tmp_path, **{**model, **saved, "train_iters": 300})
    (tmp_path / "model.yml").write_text(yaml.safe_dump({**model, "load": str(tmp_path / "save")}), encoding="utf-8")
    scorer = {"scorer": "words", "words": [LISTED], "keep": 0.4, "threshold": 0.01}
    (tmp_path / "scorer.yml").write_text(yaml.safe_dump(scorer), encoding="utf-8")
    command = [str(EXAMPLES / "detoxify" / "run.sh"), "model.yml", "scorer.yml", "work", "--num-gpus", "1"]
    said = run_script(command, tmp_path, SAMPLES="150", LENGTH="24", STEPS="150", RATE="0.002", WORKERS="1")
    before, after = (float(found) for found in re.findall(r"\((\d+\.\d)%\) at 0.01", said)[::2])
    assert before > 20
    assert after < 0.5 * before
