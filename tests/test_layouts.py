"""The names of layouts mean the ranks and keys that they say."""

import pytest

from tests.layouts import layout, pick


def test_names_are_ranks_and_keys() -> None:
    assert pick("one process", "data 2", "tensor 2, sequence", "pipeline 2, data 2, experts 2, ZeRO 1") == {
        "one process": (1, {}),
        "data 2": (2, {}),
        "tensor 2, sequence": (2, {"model_parallel_size": 2, "sequence_parallel": True}),
        "pipeline 2, data 2, experts 2, ZeRO 1": (
            4,
            {"pipe_parallel_size": 2, "moe_expert_parallel_size": 2, "zero_optimization": {"stage": 1}},
        ),
    }
    assert layout("context 4, accumulation 2, recomputed, bfloat16") == (
        4,
        {
            "context_parallel_size": 4,
            "gradient_accumulation_steps": 2,
            "checkpoint_activations": True,
            "precision": "bfloat16",
        },
    )


@pytest.mark.parametrize("name", ["tensor", "tensors 2", "ZeRO", "tensor 2,sequence", "", "shuffled"])
def test_a_part_that_means_nothing_is_refused(name: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        layout(name)
