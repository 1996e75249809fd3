"""A small valid configuration for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.config import Resolution, Resources, resolve
from megatron.errors import ConfigError

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 100,
    "tokenizer_type": "CharLevelTokenizer",
}


def resolved(world_size: int = 1, accelerator: str = "cpu", **changes: Any) -> Resolution:
    """SMALL with changes; None takes a key out."""
    values = {name: value for name, value in {**SMALL, **changes}.items() if value is not None}
    return resolve([], values, Resources(world_size, accelerator))  # type: ignore[arg-type]


def errors(world_size: int = 1, **changes: Any) -> list[str]:
    """The lines of the error that SMALL with changes makes."""
    try:
        resolved(world_size, **changes)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path
