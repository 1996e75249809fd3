"""The commands of docs/data.md, run as they are there in an empty folder."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron.data.indexed.reader import IndexedDataset

ROOT = Path(__file__).parents[2]
TITLE = "## One corpus, from lines of JSON to a trained model"


def commands():
    """The shell blocks of the section, one after another."""
    section = (ROOT / "docs/data.md").read_text(encoding="utf-8").partition(TITLE)[2].partition("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)


def test_the_walk_is_there():
    assert len(commands()) == 4


@pytest.mark.long
def test_the_walk(tmp_path):
    """From an empty folder to a validation loss that fell."""
    script = "set -euo pipefail\n" + "\n".join(commands())
    environment = os.environ | {"NEOX": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "intact: every start follows from the lengths" in done.stdout
    data = tmp_path / "data/python_stdlib"
    assert len(IndexedDataset(data / "train_text_document")) > 100
    records = [json.loads(line) for line in (tmp_path / "logs/metrics.jsonl").read_text().splitlines()]
    losses = [record["validation/lm_loss"] for record in records if "validation/lm_loss" in record]
    assert len(losses) == 2
    assert losses[-1] < 7.0
