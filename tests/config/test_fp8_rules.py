"""What products in FP8 cannot do is refused, each rule in its own words."""

from typing import Any

import pytest

from tests.config.small import errors

CASES: list[tuple[int, dict[str, Any], str]] = [
    (1, {"precision": "bfloat16", "fp8": {"recipe": "mx"}}, "one field, recipe, which is one of tensorwise, rowwise"),
    (1, {"precision": "bfloat16", "fp8": {}}, "fp8 = {}: it has one field, recipe"),
    (1, {"precision": "bfloat16", "fp8": {"recipe": "rowwise", "margin": 1}}, "it has one field, recipe"),
    (1, {"fp8": {"recipe": "rowwise"}}, "for models in bfloat16, and precision is fp32; write precision: bfloat16"),
    (
        1,
        {"precision": "bfloat16", "fp8": {"recipe": "rowwise"}, "attention_config": [[["mamba"], 2]]},
        "blocks of mamba have no such products",
    ),
    (
        1,
        {"precision": "bfloat16", "fp8": {"recipe": "blockwise"}},
        "FP8 needs widths that divide by 128, and hidden_size is 64; change it, or leave fp8 out",
    ),
    (
        8,
        {"precision": "bfloat16", "fp8": {"recipe": "rowwise"}, "model_parallel_size": 8, "num_attention_heads": 8},
        "FP8 needs widths that divide by 16, and the width of the heads of a rank is 8",
    ),
    (
        1,
        {"precision": "bfloat16", "fp8": {"recipe": "rowwise"}, "seq_length": 20},
        "numbers of tokens that divide by 16, and a micro batch of a rank has 40; change seq_length",
    ),
]


@pytest.mark.parametrize(("world_size", "changes", "reported"), CASES, ids=[case[2][:50] for case in CASES])
def test_rule(world_size: int, changes: dict[str, Any], reported: str) -> None:
    lines = errors(world_size, **changes)
    assert any(reported in line and "fp8 = " in line for line in lines), "\n".join(lines)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_what_no_rule_forbids(recipe: str) -> None:
    assert errors(2, precision="bfloat16", fp8={"recipe": recipe}, model_parallel_size=2) == []
