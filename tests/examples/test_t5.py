"""examples/t5, whole, at small size: a vocabulary with sentinels, sentences, both forms of the model, answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from megatron.metrics.sinks.jsonl import read_metrics
from tests.examples.scripts import EXAMPLES, SMALL, flags, run, write_text


@pytest.mark.parametrize("form", ["public", pytest.param("megatron", marks=pytest.mark.long)])
def test_from_raw_text_to_a_trained_encoder_decoder(form: str, tmp_path: Path) -> None:
    write_text(tmp_path / "text.jsonl", 20)
    small = {**SMALL, "optimizer": {"type": "Adam", "params": {"lr": 0.003}}, "train_batch_size": 8, "num_gpus": 1}
    for name in ("num_layers", "seq_length", "max_position_embeddings"):
        small.pop(name, None)
    small |= {"encoder_num_layers": 1, "decoder_num_layers": 1, "encoder_seq_length": 64, "decoder_seq_length": 32}
    command = [str(EXAMPLES / "t5" / "run.sh"), "text.jsonl", "work", *flags(small)]
    run(command, tmp_path, TOKENS="1000", WORKERS="1", FORM=form)
    records = [each for each in read_metrics(tmp_path / "work" / "logs") if "train/lm_loss" in each]
    assert records[-1]["train/lm_loss"] < records[0]["train/lm_loss"] - 0.3
    assert (tmp_path / "work" / "checkpoints" / "latest").read_text() == "global_step20"
    answers = [json.loads(line) for line in (tmp_path / "work" / "answers.jsonl").read_text().splitlines()]
    assert [answer["context"] for answer in answers] == (tmp_path / "work" / "prompts.txt").read_text().splitlines()
    assert all(answer["length"] > 0 or answer["finished"] for answer in answers)
    if form == "public":
        folder = tmp_path / "work" / "trained"
        tokenizer, model = AutoTokenizer.from_pretrained(folder), T5ForConditionalGeneration.from_pretrained(folder)
        given = tokenizer("a <extra_id_0> text", return_tensors="pt")
        assert tokenizer.convert_tokens_to_ids("<extra_id_0>") in given["input_ids"][0]
        with torch.no_grad():
            made = model.generate(input_ids=given["input_ids"], max_new_tokens=4, do_sample=False)
        assert made[0, 0] == tokenizer.convert_tokens_to_ids("[BOS]")
