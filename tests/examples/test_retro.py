"""examples/retro, whole, at small size: a database, a model that learns with it, and texts that go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.metrics.sinks.jsonl import read_metrics
from tests.end_to_end.test_retro import make_encoder
from tests.examples.scripts import EXAMPLES, SMALL, flags, run, write_text


@pytest.mark.long
def test_from_raw_text_to_a_model_with_retrieval(tmp_path: Path) -> None:
    write_text(tmp_path / "text.jsonl", 20)
    encoder = make_encoder(tmp_path / "encoder")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "prompts.txt").write_text("import sys\n")
    small = {**SMALL, "optimizer": {"type": "Adam", "params": {"lr": 0.003}}, "train_batch_size": 8, "num_gpus": 2}
    small |= {"retro_chunk_length": 16, "retro_cross_attention_layers": [1], "maximum_tokens": 8}
    command = [str(EXAMPLES / "retro" / "run.sh"), "text.jsonl", encoder, "work", *flags(small)]
    for _ in range(2):  # the second call finds everything done
        run(command, tmp_path, TOKENS="1000", WORKERS="1")
    records = [each for each in read_metrics(tmp_path / "work" / "logs") if "train/lm_loss" in each]
    assert records[-1]["train/lm_loss"] < records[0]["train/lm_loss"] - 0.3
    (text,) = [json.loads(line) for line in (tmp_path / "work" / "texts.jsonl").read_text().splitlines()]
    assert text["context"] == "import sys" and text["length"] == 8
