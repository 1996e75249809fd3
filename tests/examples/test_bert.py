"""examples/bert, whole, at small size: a vocabulary, sentences, and both forms of the model learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MegatronBertForPreTraining

from megatron.metrics.sinks.jsonl import read_metrics
from tests.examples.scripts import EXAMPLES, SMALL, flags, run, write_text


@pytest.mark.parametrize("form", ["megatron", pytest.param("modern", marks=pytest.mark.long)])
def test_from_raw_text_to_a_trained_encoder(form: str, tmp_path: Path) -> None:
    write_text(tmp_path / "text.jsonl", 20)
    small = {**SMALL, "optimizer": {"type": "Adam", "params": {"lr": 0.003}}, "train_batch_size": 8, "num_gpus": 1}
    command = [str(EXAMPLES / "bert" / "run.sh"), "text.jsonl", "work", *flags(small)]
    run(command, tmp_path, TOKENS="1000", WORKERS="1", FORM=form)
    records = [each for each in read_metrics(tmp_path / "work" / "logs") if "train/lm_loss" in each]
    assert records[-1]["train/lm_loss"] < records[0]["train/lm_loss"] - 0.3
    assert ("train/sop_loss" in records[-1]) == (form == "megatron")
    assert (tmp_path / "work" / "checkpoints" / "latest").read_text() == "global_step20"
    if form == "megatron":
        folder = tmp_path / "work" / "trained"
        tokenizer, model = AutoTokenizer.from_pretrained(folder), MegatronBertForPreTraining.from_pretrained(folder)
        with torch.no_grad():
            assert model(**tokenizer("a text", return_tensors="pt")).prediction_logits.shape[-1] == len(tokenizer)
