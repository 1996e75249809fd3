"""Pipeline stages are cut where DeepSpeed cuts them."""

import random
import time

import pytest
from deepspeed.runtime import utils as deepspeed_utils

from megatron.config.derived.attention import layer_classes
from megatron.plan.stages import balanced, stage_bounds, uniform


@pytest.mark.parametrize(("count", "parts"), [(10, 3), (3, 5), (12, 4), (17, 16), (1, 1)])
def test_uniform(count: int, parts: int) -> None:
    assert uniform(count, parts) == deepspeed_utils.partition_uniform(count, parts)


def test_balanced() -> None:
    source = random.Random(0)
    for trial in range(120):
        blocks = source.randint(1, 30)
        weights = [
            [source.choice([0, 1, 1, 5, 9]) for _ in range(blocks)],
            [source.randint(1, 10**6) for _ in range(blocks)],
            [source.randint(0, 300), 0, *[12] * blocks, 0, 1, source.randint(0, 300)],
        ][trial % 3]
        parts = source.randint(1, 10)
        expected = [int(bound) for bound in deepspeed_utils.partition_balanced(weights, parts)]
        assert balanced(weights, parts) == expected, (weights, parts)


def test_deep_models_are_cut_at_once() -> None:
    before = time.process_time()
    weights = [6 * 10**8, 0, *[2 * 10**8] * 1000, 0, 12288, 6 * 10**8]
    assert len(balanced(weights, 32)) == 33  # seconds, where every cut is tried
    assert time.process_time() - before < 3


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

    from megatron.model import layers

    source = inspect.getsource(layers)
    for name in set(layer_classes(1)):
        assert name in source
