"""What modules that predict further tokens cannot be combined with, by name."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config import Resources, resolve
from megatron.errors import ConfigError

KEYS: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "pos_emb": "rotary",
    "train_micro_batch_size_per_gpu": 1,
    "train_iters": 1,
    "mtp_num_layers": 1,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mtp_num_layers": 0}, "mtp_num_layers = 0: it must be from 1"),
        ({"mtp_num_layers": 32}, "mtp_num_layers = 32: it must be from 1"),
        ({"mtp_loss_scaling_factor": -0.1}, "it cannot be negative"),
        (
            {"pipe_parallel_size": 2, "pipe_schedule": "zero_bubble", "gradient_accumulation_steps": 4},
            "the modules are on the last stage of pipelines with one stage a rank",
        ),
        ({"context_parallel_size": 2}, "the tokens that follow are on other ranks"),
        ({"pos_emb": "learned"}, "a module embeds tokens anew, without positions"),
        ({"lora": {"rank": 4}}, "a frozen model has no further tokens to learn from"),
        ({"fused_linear_cross_entropy": False}, "computed together with the output layer"),
        (
            {"attention_config": ["global", "gated_delta_net"]},
            "a module has a block as the last one, which is a gated_delta_net",
        ),
        ({"attention_config": ["global", "mamba"]}, "a module has a block as the last one, which is a mamba"),
        ({"compile": True}, "the blocks of modules are not compiled"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        resolve(
            [],
            {**KEYS, **changes},
            Resources(max(changes.get("context_parallel_size", 1), changes.get("pipe_parallel_size", 1))),
        )


def test_generation_does_without_them() -> None:
    keys = {**KEYS, "pipe_parallel_size": 1, "user_script": "generate.py"}
    assert resolve([], keys, Resources(1)).config.for_inference().model.mtp_num_layers is None
    asked = resolve([], {**keys, "num_speculative_tokens": 1}, Resources(1)).config
    assert asked.for_inference().model.mtp_num_layers is None
    assert asked.for_inference(drafts=True).model.mtp_num_layers == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_speculative_tokens": 2}, "num_speculative_tokens = 2: the model has 1 modules that draft a token each"),
        ({"num_speculative_tokens": -1}, "write a number from 0 to mtp_num_layers"),
        ({"mtp_num_layers": None}, "the model has 0 modules that draft"),
        ({"pipe_parallel_size": 2}, "pipe_parallel_size = 2: num_speculative_tokens = 1: the modules need"),
        ({"recompute": True}, "recompute = True: num_speculative_tokens = 1: drafts are read with the cache"),
        ({"attention_config": ["mamba", "global"]}, "a block of kind mamba cannot take a wrong token back"),
    ],
)
def test_drafts_that_cannot_be_are_refused(changes: dict[str, Any], expected: str) -> None:
    keys = {**KEYS, "num_speculative_tokens": 1, **changes}
    with pytest.raises(ConfigError, match=expected):
        resolve([], {**keys, "user_script": "generate.py"}, Resources(keys.get("pipe_parallel_size", 1)))
    trained = {**KEYS, "num_speculative_tokens": 7}
    assert resolve([], trained, Resources(1)).config.generation.num_speculative_tokens == 7
