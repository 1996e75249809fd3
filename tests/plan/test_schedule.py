"""The pipeline schedule in the plan: figures by hand, lines, and memory of ranks with several stages."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.plan import make_plan
from megatron.plan.schedule import schedule_figures, schedule_lines
from tests.config.small import resolved

FOUR: dict[str, Any] = {
    "num_layers": 8,
    "pipe_parallel_size": 4,
    "gradient_accumulation_steps": 8,
    "make_vocab_size_divisible_by": 128,
}


@pytest.mark.parametrize(
    ("changes", "stages", "bubble", "plain"),
    [
        ({}, 1, 3 / 11, 3 / 11),
        ({"pipe_schedule": "interleaved"}, 2, 3 / 19, 3 / 11),
        ({"pipe_schedule": "zero_bubble"}, 2, 1.5 / 25.5, 3 / 11),
        ({"pipe_schedule": "dualpipev", "gradient_accumulation_steps": 4096}, 2, 1.5 / (3 * 4096 + 1.5), 3 / 4099),
        ({"pipe_schedule": "interleaved", "checkpoint_activations": True}, 2, 3 / 19, 3 / 11),
    ],
)
def test_bubbles(changes: dict[str, Any], stages: int, bubble: float, plain: float) -> None:
    config = resolved(4, **{**FOUR, **changes}).config
    assert schedule_figures(config) == {
        "schedule": config.parallelism.pipe_schedule,
        "stages_per_rank": stages,
        "bubble": pytest.approx(bubble, abs=1e-4),
        "bubble_1f1b": pytest.approx(plain, abs=1e-4),
    }
    assert make_plan(resolved(4, **{**FOUR, **changes})).json()["pipe_schedule"] == schedule_figures(config)


def test_passes_take_what_they_compute() -> None:
    """Recomputed blocks have two forward passes in front of gradients, and frozen weights no gradient."""
    lines = schedule_lines(resolved(4, **FOUR, checkpoint_activations=True).config)
    assert lines[0] == "1f1b: 4 ranks x 1 stage, 8 micro batches, bubble 27.3%"
    assert lines[4] == "rank 3 ...FIIWFIIWFIIWFIIWFIIWFIIWFIIWFIIW........."
    lines = schedule_lines(resolved(4, **FOUR, lora={"rank": 2}, pipe_schedule="zero_bubble").config)
    assert "W" not in "".join(lines[1:5]).upper()


def test_a_long_step_is_drawn_with_fewer_micro_batches() -> None:
    lines = schedule_lines(resolved(4, **{**FOUR, "gradient_accumulation_steps": 1000}).config)
    assert lines[0].startswith("1f1b: 4 ranks x 1 stage, 1000 micro batches, bubble 0.3%")
    assert lines[-1] == "drawn with 16 micro batches; further ones are like those in the middle"
    text = make_plan(resolved(4, **FOUR)).text()
    assert "  schedule     1f1b: 4 ranks x 1 stage" in text
    for stages in (0, 1):
        alone = resolved(1, pipe_parallel_size=stages)
        assert schedule_lines(alone.config) == []
        assert "pipe_schedule" not in make_plan(alone).json()


def test_memory_counts_all_stages_of_a_rank() -> None:
    """The first rank of a schedule that turns back has both ends of the model, and a tied embedding once."""
    memory = {
        (name, tied): make_plan(resolved(4, **FOUR, pipe_schedule=name, no_weight_tying=not tied)).memory
        for name in ("1f1b", "interleaved", "zero_bubble")
        for tied in (False, True)
    }
    vocabulary = 4 * 64 * 512  # bytes of a matrix of the padded vocabulary
    held = {key: found.parameters for key, found in memory.items() if found is not None}
    assert held["interleaved", False] == held["1f1b", False]
    assert held["zero_bubble", True] == held["zero_bubble", False] - vocabulary
    assert held["interleaved", True] == held["interleaved", False]
    assert len(held) == 6
