"""examples/new_language, whole, at small size: an invented language, and a perplexity far below a uniform guess."""

import os
import random
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "64"),
    *("--max-position-embeddings", "64", "--hidden-dropout", "0", "--attention-dropout", "0", "--warmup", "0.1"),
    *("--train-batch-size", "8", "--train-iters", "160", "--eval-interval", "80", "--eval-iters", "2"),
    *("--checkpoint-factor", "80", "--precision", "fp32", "--num-gpus", "1"),
]


def write_language(folder):
    """60 documents of sentences whose words follow one another by a rule."""
    generator = random.Random(0)
    words = ["".join(generator.choices(["ža", "tó", "ük", "ри", "na", "le", "שׁ"], k=3)) for _ in range(80)]
    for number in range(60):
        position = generator.randrange(80)
        sentences = []
        for _ in range(40):
            sentence = []
            for _ in range(8):
                position = (position * 7 + generator.randrange(3)) % 80
                sentence.append(words[position])
            sentences.append(" ".join(sentence) + ".")
        path = folder / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(sentences), encoding="utf-8")


def run(folder, *flags):
    environment = os.environ | {"TOKENS": "500", "WORKERS": "1", "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "examples/new_language/run.sh"), "raw", "work", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_issues_are_reported(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "one.txt").write_text("a")
    done = run(tmp_path)
    assert done.returncode == 2
    assert re.search("no file of .*/raw fell to the (train|valid) part", done.stderr)


@pytest.mark.long
def test_from_raw_text_to_perplexity(tmp_path):
    write_language(tmp_path / "raw")
    done = run(tmp_path, *SMALL)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = dict(line.split()[:2] for line in done.stdout.splitlines() if line.startswith(("perplexity_a_", "bits")))
    assert float(found["perplexity_a_token"]) < 150
    held_out = list((tmp_path / "work/split/valid").rglob("*.txt"))
    assert 0 < len(held_out) < 10
    again = run(tmp_path, *SMALL)
    assert again.returncode == 0, again.stderr[-2000:]
