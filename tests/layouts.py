"""The layouts that tests train on: a name says how ranks share the work, and means the same in every test.

    LAYOUTS = pick("tensor 2, sequence", "pipeline 2, data 2, ZeRO 1", "data 2, ZeRO 3, accumulation 2")

Nothing heavy is imported here.
"""

from __future__ import annotations

from typing import Any

Layout = tuple[int, dict[str, Any]]
"""Number of ranks, and keys of the configuration."""

AXES = {
    "tensor": "model_parallel_size",
    "pipeline": "pipe_parallel_size",
    "context": "context_parallel_size",
}
"""Axes with a key of their own; data-parallel ranks are those that remain."""
NUMBERED = {"accumulation": "gradient_accumulation_steps", "experts": "moe_expert_parallel_size"}
"""Keys that do not change the number of ranks; experts are spread over data-parallel ranks."""
WORDS: dict[str, dict[str, Any]] = {
    "one process": {},
    "sequence": {"sequence_parallel": True},
    "recomputed": {"checkpoint_activations": True},
    "bfloat16": {"precision": "bfloat16"},
}


def layout(name: str) -> Layout:
    """The layout of a name: its parts are an axis and its ranks, "ZeRO" and a stage, or what the tables above hold.

    Raises ValueError for a part that is none of them.
    """
    ranks, keys = 1, {}
    for part in name.split(", "):
        word, _, number = part.partition(" ")
        if part in WORDS:
            keys |= WORDS[part]
            continue
        value = int(number)
        if word in ("data", *AXES):
            ranks *= value
        if word == "ZeRO":
            keys["zero_optimization"] = {"stage": value}
        elif word != "data":
            keys[{**AXES, **NUMBERED}[word]] = value
    return ranks, keys


def pick(*names: str) -> dict[str, Layout]:
    """Layouts by name."""
    return {name: layout(name) for name in names}
