"""What context parallelism cannot do is refused, with the nearest lengths that it can; the rest is accepted."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.small import errors, resolved

RING = {"context_parallel_size": 2, "context_parallel_method": "ring"}
CURRICULUM = {
    "enabled": True,
    "curriculum_type": "seqlen",
    "min_difficulty": 8,
    "max_difficulty": 32,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 2},
}
CASES: list[tuple[int, dict[str, Any], str]] = [
    (
        2,
        {"context_parallel_size": 2, "num_kv_heads": 1},
        "each context parallel rank takes the same number of key heads; ring and both take any number of ranks",
    ),
    (
        2,
        {**RING, "seq_length": 34},
        "context_parallel_size = 2: seq_length = 34 does not divide into 4 parts; "
        "make seq_length a multiple of 4, such as 32 or 36",
    ),
    (
        3,
        {**RING, "context_parallel_size": 3, "seq_length": 5},
        "seq_length = 5 does not divide into 6 parts; make seq_length a multiple of 6, such as 6",
    ),
    (
        4,
        {**RING, "model_parallel_size": 2, "sequence_parallel": True, "seq_length": 34},
        "sequence_parallel = True: seq_length = 34 does not divide into 4 parts",
    ),
    (
        6,
        {"context_parallel_size": 6, "context_parallel_method": "both", "num_kv_heads": 2, "seq_length": 33},
        "context_parallel_size = 6: seq_length = 33 does not divide into 6 parts; "
        "make seq_length a multiple of 6, such as 30 or 36",
    ),
    (
        2,
        {**RING, "attention_dropout": 0.1},
        "attention_dropout = 0.1: ring attention (context_parallel_method: ring) has no such dropout; "
        "leave it out, or use context_parallel_method: ulysses",
    ),
    *(
        (2, {**RING, key: True}, f"{key} = True: ring attention (context_parallel_method: ring) has no such kernel")
        for key in ("scaled_upper_triang_masked_softmax_fusion", "scaled_masked_softmax_fusion", "te_mha")
    ),
    (1, {"context_parallel_method": "zigzag"}, "context_parallel_method = 'zigzag'"),
    (
        2,
        {**RING, "curriculum_learning": CURRICULUM},
        "a sequence is sharded into 4 parts; use multiples of 4",
    ),
]


@pytest.mark.parametrize(("world_size", "changes", "message"), CASES)
def test_it_is_refused_in_its_own_words(world_size: int, changes: dict[str, Any], message: str) -> None:
    lines = errors(world_size, max_position_embeddings=64, **changes)
    assert any(message in line for line in lines), "\n".join(lines)
    assert len(lines) == 1 + ("sequence_parallel" in changes)


ACCEPTED: dict[str, tuple[int, dict[str, Any]]] = {
    "more ranks than key heads": (4, {**RING, "context_parallel_size": 4, "num_kv_heads": 1}),
    "groups of two": (4, {"context_parallel_size": 4, "context_parallel_method": "both", "num_kv_heads": 2}),
    "both, without a ring": (
        2,
        {"context_parallel_size": 2, "context_parallel_method": "both", "attention_dropout": 0.1},
    ),
    "a window shorter than a chunk": (2, {**RING, "sliding_window_width": 3}),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_it_is_accepted(name: str) -> None:
    world_size, changes = ACCEPTED[name]
    assert resolved(world_size, **changes).not_supported_yet == []
