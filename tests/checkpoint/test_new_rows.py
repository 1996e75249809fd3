"""Rows of the embedding for tokens that the checkpoint does not know."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from megatron.checkpoint.load import vocabulary
from megatron.config import Config, Resources, resolve

MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 32, "train_iters": 2}
UNTIED = {"no_weight_tying": True}
HINT = "write modules_to_save: [embedding, head] in lora"
WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "all weights": ({}, ""),
    "lora": ({"lora": {"rank": 4}}, "embedding"),
    "lora, untied": ({"lora": {"rank": 4}, **UNTIED}, "embedding and the output layer"),
    "both": ({"lora": {"rank": 4, "modules_to_save": ["embedding", "head"]}, **UNTIED}, ""),
    "both, tied": ({"lora": {"rank": 4, "modules_to_save": ["embedding", "head"]}}, ""),
    "embedding, tied": ({"lora": {"rank": 4, "modules_to_save": ["embedding"]}}, ""),
    "embedding, untied": ({"lora": {"rank": 4, "modules_to_save": ["embedding"]}, **UNTIED}, "output layer"),
    "head, untied": ({"lora": {"rank": 4, "modules_to_save": ["head"]}, **UNTIED}, "embedding"),
    "soft prompt": ({"soft_prompt_tuning": {"num_tokens": 4}}, "embedding"),
}
"""Keys of the training, and what of the new rows stays frozen."""
SIZES = {"more rows": (598, 598), "rows of padding": (640, 598), "a token each": (640, 600)}
"""Rows of the checkpoint's embedding, and its tokens."""


def config_of(keys: dict[str, Any]) -> Config:
    batch = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    return resolve([], {**MODEL, **batch, **keys}, Resources(1)).config


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_new_rows_that_stay_frozen_are_reported(
    way: str, size: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys, frozen = WAYS[way]
    monkeypatch.setattr(vocabulary, "_stored", lambda config: vocabulary.StoredVocabulary(*SIZES[size]))
    monkeypatch.setattr(logging.getLogger("megatron"), "propagate", True)
    with caplog.at_level(logging.WARNING, "megatron"):
        rows = vocabulary.vocabulary_rows(config_of(keys), 640, tokens=600, model_size=1, may_grow=True)
    assert rows == vocabulary.Rows(640, 600)
    frozen = "" if size == "a token each" else frozen
    assert (f"the 2 new rows of the {frozen} are frozen" in caplog.text) == bool(frozen)
    assert (HINT in caplog.text) == bool(frozen)
