"""Sequence length curriculum, configured by DeepSpeed's block `curriculum_learning`.

    {enabled: true, curriculum_type: seqlen, min_difficulty: 64, max_difficulty: 2048,
     schedule_type: fixed_linear, schedule_config: {total_curriculum_step: 15000, difficulty_step: 8}}

DeepSpeed no longer reads that block; its meaning is the same here: the length of step t is
min + (max - min) (t / total)^(1/root), root 1 for fixed_linear and schedule_config.root_degree for fixed_root, rounded
down to a multiple of difficulty_step and at most max; fixed_discrete lists lengths (difficulty) and the last step of
each (max_step, one shorter). Sequences are truncated to their first tokens, so the order of the data does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron.registry import nearest_name

NAMES = ("enabled", "curriculum_type", "min_difficulty", "max_difficulty", "schedule_type", "schedule_config")
SETTINGS = {
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_discrete": ("difficulty", "max_step"),
}

Lengths = Callable[[int], int]
"""Step, counted from 1 -> tokens of each sequence."""


def curriculum_lengths(block: Mapping[str, Any] | None, seq_length: int) -> Lengths:
    """Returns the sequence length of every step, seq_length without a curriculum. The block must be valid."""
    if not block or not block.get("enabled", False):
        return lambda step: seq_length
    settings = block["schedule_config"]
    if block["schedule_type"] == "fixed_discrete":
        lengths, borders = settings["difficulty"], settings["max_step"]
        return lambda step: int(lengths[sum(step > border for border in borders)])
    low, high = block["min_difficulty"], block["max_difficulty"]
    total, multiple = settings["total_curriculum_step"], settings["difficulty_step"]
    root = settings.get("root_degree", 1)

    def length(step: int) -> int:
        reached = low + (high - low) * min(1.0, step / total) ** (1 / root)
        return int(min(high, int(reached) // multiple * multiple))

    return length


def curriculum_issues(block: Mapping[str, Any], *, seq_length: int, parts: int) -> Iterator[tuple[str, str]]:
    """Yields (message, hint) of each error. parts: into which a sequence is sharded."""
    for name in block:
        if name not in NAMES:
            yield f"there is no {name} in this block", f"did you mean {nearest_name(str(name), NAMES) or NAMES}?"
    if block.get("curriculum_type", "seqlen") != "seqlen":
        yield f"there is no curriculum over {block['curriculum_type']!r}", "write curriculum_type: seqlen"
    kind, settings = block.get("schedule_type"), block.get("schedule_config")
    if kind not in SETTINGS or not isinstance(settings, dict):
        yield (
            f"schedule_type = {kind!r} and schedule_config do not make a schedule",
            f"use one of {', '.join(SETTINGS)}",
        )
        return
    missing = [name for name in SETTINGS[kind] if name not in settings]
    extra = [name for name in settings if name not in SETTINGS[kind]]
    if missing or extra:
        yield f"schedule_config lacks {missing} and has {extra} too many", f"{kind} takes {', '.join(SETTINGS[kind])}"
        return
    if kind == "fixed_discrete":
        yield from _discrete_issues(settings, seq_length, parts)
        return
    low, high = block.get("min_difficulty"), block.get("max_difficulty")
    counts = [low, high, *settings.values()]
    if not all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in counts):
        yield "lengths and steps are whole numbers above 0", "correct the block"
        return
    yield from _range_issues(low, high, settings["difficulty_step"], seq_length, parts)


def _range_issues(low: Any, high: Any, multiple: int, seq_length: int, parts: int) -> Iterator[tuple[str, str]]:
    if not low <= high <= seq_length:
        yield f"lengths go from {low} to {high}, and seq_length is {seq_length}", "keep min <= max <= seq_length"
    if low < multiple:
        yield f"min_difficulty = {low} is below difficulty_step = {multiple}", "raise min_difficulty"
    if multiple % parts or high % parts:
        yield f"a sequence is sharded into {parts} parts", f"use multiples of {parts}"


def _discrete_issues(settings: Mapping[str, Any], seq_length: int, parts: int) -> Iterator[tuple[str, str]]:
    lengths, borders = settings["difficulty"], settings["max_step"]
    if not isinstance(lengths, list) or not isinstance(borders, list) or len(lengths) != len(borders) + 1:
        yield "difficulty is a list with one more item than max_step", "the last length holds to the end"
        return
    if not all(isinstance(length, int) and 0 < length <= seq_length and length % parts == 0 for length in lengths):
        yield f"lengths are between 1 and seq_length = {seq_length}, in multiples of {parts}", "correct difficulty"
    if sorted(borders) != borders:
        yield f"max_step = {borders} does not rise", "put the steps in order"
