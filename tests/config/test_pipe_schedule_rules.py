"""Rules of pipeline schedules: what is refused, with the nearest values that are not."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config.derived.pipe_layout import pipe_layout
from megatron.pipe_schedule.layout import PipeLayout
from tests.config.small import errors, resolved

FOUR: dict[str, Any] = {
    "num_layers": 8,
    "pipe_parallel_size": 4,
    "gradient_accumulation_steps": 8,
}
INTERLEAVED = {**FOUR, "pipe_schedule": "interleaved"}
BLOCKS = "num_layers_per_virtual_pipeline_stage"


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({}, PipeLayout("1f1b", 4, 1)),
        ({"pipe_schedule": "interleaved"}, PipeLayout("interleaved", 4, 2)),
        ({"pipe_schedule": "interleaved", "num_layers": 32, BLOCKS: 2}, PipeLayout("interleaved", 4, 4)),
        (
            {"pipe_schedule": "interleaved", "num_layers": 13, "pipe_partition_method": [1] * 11 + [2]},
            PipeLayout("interleaved", 4, 3),
        ),
        ({"pipe_schedule": "zero_bubble", "gradient_accumulation_steps": 1}, PipeLayout("zero_bubble", 4, 2)),
        ({"pipe_schedule": "dualpipev", "num_layers": 9}, PipeLayout("dualpipev", 4, 2)),
        ({"pipe_schedule": "interleaved", "gradient_accumulation_steps": 3}, PipeLayout("interleaved", 4, 2)),
    ],
    ids=str,
)
def test_layouts(changes: dict[str, Any], layout: PipeLayout) -> None:
    assert errors(4, **{**FOUR, **changes}) == []
    assert pipe_layout(resolved(4, **{**FOUR, **changes}).config) == layout


def test_one_stage_has_no_schedule() -> None:
    for stages in (0, 1):
        found = resolved(1, pipe_parallel_size=stages, pipe_schedule="zero_bubble")
        assert pipe_layout(found.config) == PipeLayout("1f1b", 1)
        assert any("pipe_schedule" in warning and "one pipeline stage" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pipe_schedule": "zero_buble"}, "pipe_schedule = 'zero_buble'"),
        (
            {**INTERLEAVED, "num_layers": 7},
            "pipe_schedule = 'interleaved': 4 ranks have 8 stages, and there are only 7 blocks; use a "
            "pipe_parallel_size of at most 3, or pipe_schedule: 1f1b",
        ),
        (
            {**INTERLEAVED, "num_layers": 24, BLOCKS: 4},
            f"{BLOCKS} = 4: a rank has 6 blocks, which it does not cut into several stages; write 1 or 2 or 3",
        ),
        ({**INTERLEAVED, BLOCKS: 2}, "a rank has 2 blocks, which it does not cut into several stages; write 1"),
        ({**INTERLEAVED, BLOCKS: 0}, f"{BLOCKS} = 0"),
        ({**INTERLEAVED, "num_layers": 9, BLOCKS: 1}, "the 9 blocks do not divide by pipe_parallel_size = 4"),
        (
            {**INTERLEAVED, "pipe_partition_method": [2, 2, 2, 2]},
            "pipe_partition_method = [2, 2, 2, 2]: this does not assign 8 blocks to 8 stages",
        ),
        (
            {**INTERLEAVED, "gradient_accumulation_steps": 11},
            "gradient_accumulation_steps = 11: interleaved on 4 ranks does not take a step of 11 micro batches; "
            "the nearest it takes: 10 or 12",
        ),
        (
            {**FOUR, "pipe_schedule": "dualpipev", "gradient_accumulation_steps": 7},
            "gradient_accumulation_steps = 7: dualpipev on 4 ranks does not take a step of 7 micro batches; "
            "the nearest it takes: 8",
        ),
        (
            {**FOUR, "pipe_schedule": "dualpipev", "rampup_batch_size": [8, 8, 64]},
            "rampup_batch_size = [8, 8, 64]: dualpipev on 4 ranks does not take a step of 4 micro batches",
        ),
        (
            {**INTERLEAVED, "checkpoint_activations": True, "partition_activations": True}
            | {"contiguous_checkpointing": True},
            "contiguous_checkpointing = True: DeepSpeed's buffer",
        ),
        ({**FOUR, "pipe_schedule": "zero_bubble", "compile": True}, "with compile a layer computes the gradient"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], text: str) -> None:
    lines = errors(4, **{**FOUR, **changes})
    assert any(text in line for line in lines), "\n".join(lines)
    assert len(lines) == 1, lines
