"""Which layouts are refused: exactly two combinations, each with its own reason; every other one resolves."""

import itertools
from typing import Any

import pytest

from tests.config.small import errors, resolved

SIZES: dict[str, tuple[Any, ...]] = {
    "model_parallel_size": (1, 2, 4),
    "pipe_parallel_size": (0, 1, 2, 4),
    "data": (1, 2),
    "zero": (0, 1, 2, 3),
    "sequence_parallel": (False, True),
    "context_parallel_size": (1, 2),
}
MODEL = {"num_layers": 4, "num_attention_heads": 16, "num_kv_heads": 8}


def reasons(layout: dict[str, Any]) -> dict[str, str]:
    """Returns key -> message for combinations that are rejected."""
    reported = {}
    stages, zero = layout["pipe_parallel_size"], layout["zero"]
    if stages >= 1 and zero >= 2:
        reported["zero_optimization"] = f"(pipe_parallel_size = {stages}) does not work with ZeRO stage {zero}"
    if layout["sequence_parallel"] and layout["model_parallel_size"] == 1:
        reported["sequence_parallel"] = "there are no tensor parallel ranks to shard the sequence over"
    return reported


@pytest.mark.parametrize("accumulation", [1, 4])
def test_exactly_two_combinations_are_refused(accumulation: int) -> None:
    legal = 0
    for values in itertools.product(*SIZES.values()):
        layout = dict(zip(SIZES, values, strict=True))
        settings = {name: value for name, value in layout.items() if name not in {"data", "zero"}}
        settings |= {"zero_optimization": {"stage": layout["zero"]}, "gradient_accumulation_steps": accumulation}
        ranks = (
            layout["model_parallel_size"]
            * max(1, layout["pipe_parallel_size"])
            * layout["data"]
            * layout["context_parallel_size"]
        )
        expected = reasons(layout)
        lines = errors(ranks, **MODEL, **settings)
        assert len(lines) == len(expected), (layout, lines)
        for key, why in expected.items():
            assert any(line.startswith(f"command line: {key} = ") and why in line for line in lines), (layout, lines)
        if not expected:
            assert resolved(ranks, **MODEL, **settings).not_supported_yet == []
            legal += 1
    assert legal == 200  # of 384, with worlds of up to 32 ranks


@pytest.mark.parametrize("method", ["type:nothing", "type:", "type:mamba"])
def test_a_class_that_no_layer_has_cannot_part_the_stages(method: str) -> None:
    (line,) = errors(2, pipe_parallel_size=2, pipe_partition_method=method)
    assert "no layer of this model is of such a class" in line and "TransformerBlock" in line
    assert errors(2, pipe_parallel_size=2, pipe_partition_method="type:TRANSFORMER") == []
