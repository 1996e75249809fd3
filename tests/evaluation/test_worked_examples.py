"""Tasks that fix the number of their worked examples."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from megatron.evaluation.tasks import Tasks
from tests.evaluation.test_lm_eval_model import CHOICE


def test_a_task_without_worked_examples_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "documents.jsonl"
    data.write_text(json.dumps({"question": "a", "choices": ["b", "c"], "answer": 0}) + "\n")
    text = CHOICE.format(data=data).replace("small_choice", "small_fixed")
    (tmp_path / "fixed.yaml").write_text(text + "num_fewshot: 0\n")
    with caplog.at_level(logging.WARNING):
        Tasks(["small_fixed"], str(tmp_path), fewshot=2)
    assert "task small_fixed fixes its worked examples at 0; eval_num_fewshot = 2" in caplog.text
