"""Pipeline stages are cut where DeepSpeed cuts them."""

import random

import pytest
from deepspeed.runtime import utils as deepspeed_utils

from megatron.plan.stages import balanced, layer_classes, stage_bounds, uniform


@pytest.mark.parametrize(("count", "parts"), [(10, 3), (3, 5), (12, 4), (17, 16), (1, 1)])
def test_uniform(count: int, parts: int) -> None:
    assert uniform(count, parts) == deepspeed_utils.partition_uniform(count, parts)


def test_balanced() -> None:
    source = random.Random(0)
    for _ in range(40):
        weights = [source.choice([0, 1, 1, 5, 9]) for _ in range(source.randint(1, 14))]
        parts = source.randint(1, 5)
        expected = [int(bound) for bound in deepspeed_utils.partition_balanced(weights, parts)]
        assert balanced(weights, parts) == expected, (weights, parts)


def test_methods() -> None:
    classes = layer_classes(4)
    parameters = [90, 0, 10, 10, 10, 10, 0, 1, 90]
    assert stage_bounds("uniform", classes, parameters, 2) == [0, 5, 9]
    bounds = stage_bounds("type:transformer|mlp", classes, parameters, 2)
    assert [classes[bounds[i] : bounds[i + 1]].count("TransformerBlock") for i in (0, 1)] == [2, 2]
    assert stage_bounds("parameters", classes, parameters, 3)[0] == 0
    assert stage_bounds((0, 3, 1), classes, parameters, 3) == [0, 2, 5, 9]
    with pytest.raises(ValueError, match="no partition method"):
        stage_bounds("even", classes, parameters, 2)


def test_class_names_are_those_of_the_layer_plan() -> None:
    import inspect

    from megatron.model import plan

    source = inspect.getsource(plan)
    for name in set(layer_classes(1)):
        assert name in source
