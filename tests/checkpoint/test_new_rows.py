"""Rows of the embedding for tokens that the checkpoint does not know."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from megatron.checkpoint.load import vocabulary
from megatron.config import Config, Resources, resolve

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "train_iters": 2}
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "all weights": ({}, False),
    "lora": ({"lora": {"rank": 4}}, True),
    "soft prompt": ({"soft_prompt_tuning": {"num_tokens": 4}}, True),
}
"""Keys of the training, and whether the new rows stay frozen."""


def config_of(keys: dict[str, Any]) -> Config:
    batch = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    return resolve([], {**MODEL, **batch, **keys}, Resources(1)).config


@pytest.mark.parametrize("way", WAYS)
def test_new_rows_that_stay_frozen_are_reported(
    way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys, frozen = WAYS[way]
    monkeypatch.setattr(vocabulary, "_stored_rows", lambda config: 598)
    monkeypatch.setattr(logging.getLogger("megatron"), "propagate", True)
    with caplog.at_level(logging.WARNING, "megatron"):
        rows = vocabulary.vocabulary_rows(config_of(keys), 640, tokens=600, model_size=1, may_grow=True)
    assert rows == vocabulary.Rows(640, 600)
    assert ("the 2 new rows are frozen" in caplog.text) == frozen
